import io
import os

import pytest
import torch
from deepinv.models import Reconstructor
from rich.console import Console

from flowprox.evaluation import demo
from flowprox.evaluation.demo import DEMO_PROBLEMS, run_demo
from flowprox.records import read_records


class StandIn(Reconstructor):
    """Four gradient steps."""

    def __init__(self):
        super().__init__()
        self.step = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, y, physics):
        x = y
        for _ in range(4):
            x = x + self.step * physics.A_adjoint(y - physics.A(x))
        return x


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two small pictures and quick classical methods: the full demo takes half a minute."""
    small = [("astronaut", torch.rand(3, 24, 24)), ("coffee", torch.rand(3, 24, 32))]
    monkeypatch.setattr(demo, "sample_images", lambda: small)
    monkeypatch.setattr(demo, "classical_method", lambda problem: ("stand-in", StandIn()))


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longer than everything else, and one test looks at the figures."""
    monkeypatch.setattr(demo, "write_figures", lambda folder: [])
    monkeypatch.setattr(demo, "write_report", lambda folder, options: folder / "report.html")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def models():
    return {problem: StandIn() for problem in DEMO_PROBLEMS}


@pytest.mark.parametrize("method", ["tv", "bm3d"])
def test_a_missing_bm3d_is_said(tmp_path, console, no_figures, monkeypatch, method):
    monkeypatch.setattr(demo, "classical_method", lambda problem: (method, StandIn()))
    run_demo(tmp_path / "demo", models(), console=console)
    assert ("bm3d is not installed" in console.file.getvalue()) == (method == "tv")


def test_everything_is_written(tmp_path, console):
    out = tmp_path / "new" / "demo"
    assert run_demo(out, models(), console=console) == out / "report.html"
    records = read_records(out / "records.jsonl")
    assert len(records) == 3 * 2 * 3
    keys = {"problem", "parameters", "method", "image", "psnr", "ssim", "seconds", "seed", "version", "group"}
    assert all(set(record) == keys for record in records)
    assert {path.name for path in out.iterdir()} == {"records.jsonl", "report.html", "images", "figures"}
    assert len(list((out / "images").iterdir())) == 2 + len(records)
    assert len(list((out / "figures").iterdir())) == 4
    assert [path.name for path in out.parent.iterdir()] == ["demo"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "no picture" not in page and "unfolded-deblurring-faces64" in page
    assert "unfolded-inpainting-faces64" in console.file.getvalue()


def test_the_same_seed_gives_the_same_scores(tmp_path, console, no_figures):
    def scores(name, seed):
        run_demo(tmp_path / name, models(), seed=seed, console=console)
        return [record["psnr"] for record in read_records(tmp_path / name / "records.jsonl")]

    first = scores("a", 0)
    assert scores("b", 0) == first
    assert scores("c", 7) != first


def test_an_interrupted_run_leaves_nothing(tmp_path, console):
    class Broken(StandIn):
        def forward(self, y, physics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", {"inpainting": Broken()}, console=console)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_demo_is_replaced_only_when_asked(tmp_path, console, no_figures):
    out = tmp_path / "demo"
    run_demo(out, {}, console=console)
    before = (out / "records.jsonl").stat().st_ino
    with pytest.raises(FileExistsError, match="not empty"):
        run_demo(out, {}, console=console)
    assert (out / "records.jsonl").stat().st_ino == before
    run_demo(out, {}, overwrite=True, console=console)
    assert (out / "records.jsonl").stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_never_touched(tmp_path, console, overwrite):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out"):
        run_demo(tmp_path, {}, overwrite=overwrite, console=console)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_fails_before_computing(tmp_path, console):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="out is a file"):
        run_demo(tmp_path / "file", None, console=console)
    with pytest.raises(OSError, match="out cannot be written"):
        run_demo(tmp_path / "file" / "demo", None, console=console)
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError, match="out cannot be written"):
            run_demo(tmp_path / "demo", None, console=console)


def test_an_unknown_problem_raises(tmp_path, console):
    with pytest.raises(ValueError, match=r"models has no use for deblurr; its keys are denoising"):
        run_demo(tmp_path / "demo", {"deblurr": StandIn()}, console=console)
