"""The requests of a batch are found however its body is cut, and so are lines."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeyard.producer.gateway.batches.cutting import CutTooLong, RequestCutter
from codeyard.producer.gateway.files.lines import Line, LineCutter

texts = st.text(alphabet=st.sampled_from('{}[]",:\\ \näx1'), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
requests = st.lists(st.dictionaries(texts, values, max_size=4), max_size=6)


@given(requests, st.integers(1, 40), st.booleans())
def test_every_request_is_found_however_the_body_is_cut(asked: list[object], width: int, ascii_only: bool) -> None:
    """Brackets and quotes in texts are no structure."""
    body = json.dumps({"requests": asked}, ensure_ascii=ascii_only, indent=1).encode()
    cutter = RequestCutter(10_000)

    found = [one for start in range(0, len(body), width) for one in cutter.feed(body[start : start + width])]

    assert [json.loads(one) for one in found] == asked
    assert cutter.complete()


@pytest.mark.parametrize(
    "body",
    [
        b'{"requests": [{}]',
        b'{"requests": [{}}]}',
        b'{"requests": [{},]}',
        b'{"requests": [{} {}]}',
        b"",
        b'{"a',
        b"]]]",
    ],
)
def test_what_is_around_the_requests_must_be_json(body: bytes) -> None:
    """A body that broke off is not a smaller batch."""
    cutter = RequestCutter(10_000)
    cutter.feed(body)

    with pytest.raises(ValueError, match=r".+"):
        cutter.complete()


@pytest.mark.parametrize(
    "body",
    [
        b"[{}]",
        b"null",
        b'{"requests": {}}',
        b'{"requests": [1]}',
        b'{"requests": [[{}]]}',
        b'{"requests": [{}], "x": 1}',
        b'{"x": [{}], "requests": []}',
        b'{"requests": [{}], "requests": [{}]}',
    ],
)
def test_nothing_but_a_list_of_objects_is_a_batch(body: bytes) -> None:
    """What is not understood is refused."""
    cutter = RequestCutter(10_000)
    cutter.feed(body)

    assert not cutter.complete()


def test_no_more_than_one_request_is_held() -> None:
    """Nor a frame without end: brackets cost what they weigh."""
    with pytest.raises(CutTooLong):
        RequestCutter(1_000).feed(b'{"requests": [{"a": "' + b"x" * 2_000)
    with pytest.raises(CutTooLong):
        RequestCutter(1_000).feed(b"[" * 2_000_000)


@given(st.lists(st.binary(max_size=30), max_size=8), st.integers(1, 20))
def test_lines_are_the_same_however_they_arrive(parts: list[bytes], width: int) -> None:
    """Blank ones are counted and left out; the last needs no line break."""
    body = b"\n".join(part.replace(b"\xef\xbb\xbf", b"") for part in parts)
    cutter = LineCutter(10_000)

    found = [line for start in range(0, len(body), width) for line in cutter.feed(body[start : start + width])]
    found += cutter.end()

    expected = [Line(n, raw.strip()) for n, raw in enumerate(body.split(b"\n"), start=1) if raw.strip()]
    assert found == expected


def test_a_line_that_is_too_long_is_told_and_not_held() -> None:
    """The next one is read again."""
    cutter = LineCutter(10)

    found = [line for piece in (b"short\n" + b"x" * 8, b"x" * 8, b"x\n", b"after") for line in cutter.feed(piece)]
    found += cutter.end()

    assert found == [Line(1, b"short"), Line(2, None), Line(3, b"after")]
