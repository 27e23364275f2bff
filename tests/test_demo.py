import io
import os
from dataclasses import replace

import pytest
from rich.console import Console

from flowprox import demo
from flowprox.demo import DEMO_PROBLEMS, demo_recipe, run_demo
from flowprox.evaluation import run as run_module
from flowprox.evaluation.plan import planned
from flowprox.evaluation.run import EvaluationInterrupted
from flowprox.options import EvaluatedMethod, ImageOptions
from flowprox.records import read_records

FULL = demo_recipe()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two small pictures and a quick method: the full demo takes half a minute."""
    methods = [EvaluatedMethod("measurement"), EvaluatedMethod("tv", "quick", options={"n_iterations": 2})]
    recipe = replace(FULL, images=ImageOptions(FULL.images.source, image_size=24, limit=3), methods=methods)
    monkeypatch.setattr(demo, "demo_recipe", lambda: recipe)


@pytest.fixture
def no_page(monkeypatch):
    """Drawing takes longer than everything else, and one test looks at the page."""
    monkeypatch.setattr(demo, "write_report", lambda folder, options: folder / "report.html")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def test_the_full_demo_shows_a_network_and_a_classical_method_for_every_problem(monkeypatch):
    labels = {(case.problem.label, case.label) for case in planned(FULL)}
    assert {problem for problem, _ in labels} == set(DEMO_PROBLEMS)
    assert all((problem, f"unfolded-{problem}-faces64") in labels for problem in DEMO_PROBLEMS)
    for has_it, name in ((True, "bm3d"), (False, "tv")):
        monkeypatch.setattr(demo, "_has_bm3d", lambda has_it=has_it: has_it)
        assert ("denoising", name) in {(case.problem.label, case.label) for case in planned(demo_recipe())}


def test_a_missing_bm3d_is_said(tmp_path, console, no_page, monkeypatch):
    tv = EvaluatedMethod("tv", options={"n_iterations": 2}, problems=["denoising"])
    recipe = replace(demo.demo_recipe(), methods=[tv])
    monkeypatch.setattr(demo, "demo_recipe", lambda: recipe)
    run_demo(tmp_path / "demo", console=console)
    assert "bm3d is not installed" in console.file.getvalue()


def test_everything_is_written_behind_a_link_too(tmp_path, console):
    (tmp_path / "disk").mkdir()
    (tmp_path / "new").symlink_to(tmp_path / "disk")
    out = tmp_path / "new/demo"
    assert run_demo(out, console=console) == out / "report.html"
    records = read_records(out / "records.jsonl")
    assert len(records) == 3 * 3 * 2
    assert {record["group"] for record in records} == {"portraits", "other pictures"}
    names = {"records.jsonl", "report.html", "images", "recipe.yaml"}
    assert {path.name for path in (tmp_path / "disk/demo").iterdir()} == names
    assert len(list((out / "images").iterdir())) == 3 + len(records)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "no picture" not in page and "quick" in page
    assert "portraits" in console.file.getvalue() and "bm3d is not installed" not in console.file.getvalue()


def test_the_same_seed_gives_the_same_scores(tmp_path, console, no_page):
    def scores(name, seed):
        run_demo(tmp_path / name, seed=seed, console=console)
        return [record["psnr"] for record in read_records(tmp_path / name / "records.jsonl")]

    first = scores("a", 0)
    assert scores("b", 0) == first
    assert scores("c", 7) != first


def test_an_interrupted_demo_is_completed_and_another_begins_anew_only_when_asked(
    tmp_path, console, no_page, monkeypatch
):
    out = tmp_path / "demo"
    estimate = run_module.estimate
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return estimate(*arguments)

    monkeypatch.setattr(run_module, "estimate", interrupted)
    with pytest.raises(EvaluationInterrupted, match="the same command continues"):
        run_demo(out, console=console)
    done = read_records(out / "records.jsonl")
    assert done
    run_demo(out, console=console)
    assert read_records(out / "records.jsonl")[: len(done)] == done
    n_calls = len(calls)
    run_demo(out, console=console)
    assert len(calls) == n_calls
    with pytest.raises(ValueError, match="another seed"):
        run_demo(out, seed=1, console=console)
    run_demo(out, seed=1, overwrite=True, console=console)
    assert {record["run_seed"] for record in read_records(out / "records.jsonl")} == {1}
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_never_touched(tmp_path, console, overwrite):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out"):
        run_demo(tmp_path, overwrite=overwrite, console=console)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_written_fails_before_computing(tmp_path, console):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        run_demo(tmp_path / "file", console=console)
    with pytest.raises(OSError, match="out cannot be written"):
        run_demo(tmp_path / "file" / "demo", console=console)
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError, match="out cannot be written"):
            run_demo(tmp_path / "demo", console=console)
