"""docs/wire-contract.md is what somebody in another language works from: its examples must be true."""

import re
from pathlib import Path

import pytest

from codeyard.shared.job import Job, job_id_for_key
from codeyard.shared.record import Event, Result
from codeyard.shared.topology import Topology

DOC = Path(__file__).parents[2] / "docs" / "wire-contract.md"


def block(name: str) -> str:
    found = re.search(rf"```{name}\n(.*?)\n```", DOC.read_text(), re.DOTALL)
    assert found, f"the page has no {name} example"
    return found[1]


def test_the_example_id_is_what_the_clients_derive_from_the_key() -> None:
    """Another language must find the same job under the same key."""
    assert job_id_for_key("default", "slugify-42") == block("id")


def test_the_example_body_is_what_the_clients_write_byte_for_byte() -> None:
    """And it decodes to the job it stands for."""
    job = Job.decode(block("body").encode())

    assert job.encode().decode() == block("body")
    assert (job.id, job.model, job.prompt) == (block("id"), "starter", "def slugify(title):")


def test_the_example_names_are_the_names_in_use() -> None:
    """A routing key or Redis key that is a little off finds nothing."""
    topology, job = Topology(), Job.decode(block("body").encode())

    queue = topology.job_queue(job.revision, job.lane)
    assert [queue, topology.job_key(job.id, "record"), topology.job_key(job.id, "events")] == block(
        "names"
    ).splitlines()


def test_the_example_result_and_event_decode() -> None:
    """Field names in the page are the field names in the store."""
    assert Result.decode(block("result")).text == "\n    return title.lower()"
    assert Event.decode(block("event")).token_ids == (262, 412)


@pytest.mark.parametrize("field", list(Job.model_fields))
def test_every_field_of_a_job_is_in_the_page(field: str) -> None:
    """A new field must not stay undocumented."""
    assert f"`{field}`" in DOC.read_text()
