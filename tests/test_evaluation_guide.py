"""What docs/guide/compare.md shows is what runs."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from report_cases import Tags

from flowprox.baselines import TotalVariation
from flowprox.cli import main
from flowprox.data import save_image
from flowprox.methods import METHODS
from flowprox.records import read_records

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs/guide/compare.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")


def _commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    return [shlex.split(line, comments=True)[1:] for block in blocks for line in block.splitlines()]


def test_ten_lines_evaluate_a_folder_and_an_operator_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = METHODS["tv"]._replace(make=partial(TotalVariation, n_iterations=20), explained_in=(TotalVariation,))
    monkeypatch.setitem(METHODS, "tv", quick)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    assert len(recipe.splitlines()) == 10
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i in range(2):
        save_image(torch.rand(3, 5, 4).repeat_interleave(16, 1).repeat_interleave(16, 2), Path(f"pictures/{i}.png"))
    np.save("kernel.npy", np.full((5, 5), 1 / 25))
    Path("mine.yaml").write_text(recipe)
    evaluate, report = _commands()[:2]
    assert main(evaluate) == 0 and main(report) == 0, capsys.readouterr().err
    records = read_records("runs/mine/records.jsonl")
    assert {r["problem"] for r in records} == {"my camera", *(f"denoising-sigma{s}" for s in (0.1, 0.2))}
    assert {r["method"] for r in records if r["problem"] == "my camera"} == {"measurement", "wiener", "tv"}
    text = Tags(Path("runs/mine/report.html").read_text()).text
    assert "PSNR over sigma" in text and "bm3d (not run here)" in text and "Asim et al. (2020)" in text


def test_the_records_that_are_kept_make_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (words,) = [words for words in _commands() if "docs/evidence/records/asim-denoising.jsonl" in words]
    words[words.index("--out") + 1] = str(tmp_path / "asim")
    assert main([*words, "--parts", "overview"]) == 0
    table = (tmp_path / "asim/tables/overview.md").read_text()
    bm3d = next(line for line in table.splitlines() if "bm3d" in line)
    results = (ROOT / "docs/evidence/results.md").read_text().splitlines()
    documented = next(line for line in results if line.startswith("| bm3d"))
    figures = re.findall(r"[\d.]+", re.sub(r"\([\d.]+\)", "", documented.replace("bm3d", "")))
    assert re.findall(r"[\d.]+", bm3d.replace("bm3d", "")) == figures
