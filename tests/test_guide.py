"""The guide's Python runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowprox.methods import METHODS
from flowprox.operators import PROBLEMS

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("docs/**/*.md"))
RUN = ["concepts.md", "extend.md", "reconstruct.md", "uncertainty.md"]


@pytest.fixture
def _entries() -> Iterator[None]:
    """What a page enters in a registry is taken out again."""
    problems, methods = dict(PROBLEMS), dict(METHODS)
    yield
    for registry, before in ((PROBLEMS, problems), (METHODS, methods)):
        for name in set(registry) - set(before):
            del registry[name]


@pytest.mark.usefixtures("_entries")
@pytest.mark.parametrize("name", RUN)
def test_the_pages_code_runs(name: str) -> None:
    text = (ROOT / "docs" / "guide" / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    space: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, name, "exec"), space)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
