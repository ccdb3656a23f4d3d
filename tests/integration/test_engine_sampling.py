"""How the torch engine draws tokens: by each row's own settings, as they are defined."""

from collections import Counter
from typing import Any

import pytest

from codeyard.shared.job import Sampling

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

ODDS = [0.4, 0.3, 0.15, 0.1, 0.05]
DRAWS = 4_000


def drawn(history: list[int] | None = None, prompt: list[int] | None = None, **settings: object) -> Counter[int]:
    """How often each token comes, over many rows drawn at once from ODDS."""
    from codeyard.worker.engines.sampling import RowSampling, choose

    torch.manual_seed(1)
    rows = [RowSampling(Sampling.model_validate(settings), torch.device("cpu"))] * DRAWS
    logits = torch.tensor(ODDS).log().repeat(DRAWS, 1)
    return Counter(choose(logits, rows, [prompt or []] * DRAWS, [history or []] * DRAWS))


def expected(weights: dict[int, float]) -> dict[int, float]:
    total = sum(weights.values())
    return {token: DRAWS * weight / total for token, weight in weights.items()}


def close(counts: Counter[int], want: dict[int, float]) -> bool:
    """Within five standard deviations, and no token that is not wanted."""
    return set(counts) <= set(want) and all(abs(counts[token] - n) <= 5 * n**0.5 for token, n in want.items())


@pytest.mark.parametrize(
    "settings,weights",
    [
        ({"temperature": 1.0}, dict(enumerate(ODDS))),
        ({"temperature": 0.5}, {token: odds**2 for token, odds in enumerate(ODDS)}),
        ({"temperature": 1.0, "top_k": 2}, {0: 0.4, 1: 0.3}),
        ({"temperature": 1.0, "top_k": 99}, dict(enumerate(ODDS))),
        ({"temperature": 1.0, "top_p": 0.6}, {0: 0.4, 1: 0.3}),  # the token that crosses p stays
        ({"temperature": 1.0, "top_p": 0.01}, {0: 1.0}),
        ({"temperature": 1.0, "top_p": 1.0}, dict(enumerate(ODDS))),
        ({"temperature": 1.0, "min_p": 0.3}, {0: 0.4, 1: 0.3, 2: 0.15}),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, {0: 0.4, 1: 0.3}),  # p of what top-k left
    ],
)
def test_tokens_come_as_often_as_the_settings_say(settings: dict[str, Any], weights: dict[int, float]) -> None:
    """A wrong filter still writes plausible code; only counting shows it."""
    assert close(drawn(**settings), expected(weights))


def test_no_temperature_is_greedy() -> None:
    """The documented default."""
    assert drawn() == {0: DRAWS}
    assert drawn(temperature=0) == {0: DRAWS}


def test_presence_and_frequency_count_only_what_was_generated() -> None:
    """Greedy shows it: the likeliest token gives way once it is dearer than the next one."""
    assert drawn(history=[0], presence_penalty=0.5) == {1: DRAWS}
    assert drawn(prompt=[0], presence_penalty=0.5) == {0: DRAWS}
    assert drawn(history=[0], frequency_penalty=0.2) == {0: DRAWS}
    assert drawn(history=[0, 0], frequency_penalty=0.2) == {1: DRAWS}


def test_repetition_counts_the_prompt_too() -> None:
    """As vLLM and transformers do."""
    assert drawn(prompt=[0], repetition_penalty=1.5) == {1: DRAWS}
    assert drawn(history=[0], repetition_penalty=1.5) == {1: DRAWS}
    assert drawn(prompt=[1], repetition_penalty=1.5) == {0: DRAWS}


def test_each_row_of_a_batch_has_its_own_settings() -> None:
    """Jobs of different callers share a batch."""
    from codeyard.worker.engines.sampling import RowSampling, choose

    rows = [
        RowSampling(Sampling.model_validate(settings), torch.device("cpu"))
        for settings in (
            {},
            {"temperature": 2.0, "top_k": 1},
            {"presence_penalty": 2.0},
            {"temperature": 1.0, "seed": 5},
        )
    ]
    logits = torch.tensor(ODDS).log().repeat(4, 1)
    several = [choose(logits, rows, [[]] * 4, [[0]] * 4) for _ in range(20)]
    assert {tokens[0] for tokens in several} == {0}
    assert {tokens[1] for tokens in several} == {0}
    assert {tokens[2] for tokens in several} == {1}

    alone = RowSampling(Sampling(temperature=1.0, seed=5), torch.device("cpu"))
    again = [choose(logits[:1], [alone], [[]], [[0]])[0] for _ in range(20)]
    assert [tokens[3] for tokens in several] == again
    assert len(set(again)) > 1
