"""The guide's Python runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowprox.cli import completed, make_parser
from flowprox.commands.terminal import key_values
from flowprox.methods import METHODS, check_options
from flowprox.operators import PROBLEMS, Problem

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


def test_what_the_table_of_jobs_says_are_commands_of_known_problems_and_methods() -> None:
    text = (ROOT / "docs" / "guide" / "reconstruct.md").read_text(encoding="utf-8")
    lines = [
        cell for row in re.findall(r"^\| .*", text, re.MULTILINE) for cell in re.findall(r"`(--m[^`]*--[^`]*)`", row)
    ]
    parser, seen = make_parser(), set()
    for line in lines:
        words = [*shlex.split(line.replace("NAME", "unfolded-denoising-faces64")), "--out", "clean", "--", "photo.jpg"]
        options = parser.instantiate(parser.parse_args(completed(["reconstruct", *words])))["reconstruct"]
        if options.method:
            check_options(options.method, key_values(options.options, "options"))
        if options.problem:
            Problem(options.problem, key_values(options.parameters, "parameters"))
            seen.add(options.problem)
    assert {"inpainting", "deblurring", "super-resolution", "mri", "multicoil-mri", "ct", "compressed-sensing"} <= seen


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
