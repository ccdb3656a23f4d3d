"""Pages that point at nothing, or leave settings out, cost their readers an evening."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from codeyard.shared.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """A moved page must not leave dead links behind."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_every_setting_is_in_the_settings_page() -> None:
    """An operator looks there, not into the source."""
    page = (ROOT / "docs" / "settings.md").read_text()
    names = []
    for group, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += [f"CODEYARD_{group}_{name}".upper() for name in kind.model_fields]
        else:
            names.append(f"CODEYARD_{group}".upper())
    assert [name for name in names if f"`{name}`" not in page] == []


def test_the_readme_names_the_test_command_that_ci_runs() -> None:
    """What passes there is what a newcomer runs."""
    assert "make test" in (ROOT / "README.md").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
