"""Evaluation: what is recorded, that nothing is done twice or lost, that noise is shared, and every recipe in miniature."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from PIL import Image
from rich.console import Console
from torch import Tensor

from flowprox.baselines import BM3D
from flowprox.checkpoints import load_model, save_model
from flowprox.cli import main, make_parser
from flowprox.data import save_image
from flowprox.estimates import Estimate, estimate
from flowprox.evaluation import run as run_module
from flowprox.evaluation.plan import at_scale, load_images, planned, published_figures
from flowprox.evaluation.report import picture_path, write_report
from flowprox.evaluation.run import EvaluationInterrupted, evaluate
from flowprox.files import sole_writer
from flowprox.flows import Glow
from flowprox.metrics import psnr
from flowprox.operators import ProblemKind, make_physics, measure_each
from flowprox.options import (
    EvaluatedMethod,
    EvaluatedProblem,
    EvaluationOptions,
    ImageOptions,
    ScaleOptions,
)
from flowprox.prox import FlowProx, UNetProx
from flowprox.records import NOT_RUN, Record, RecordWriter, read_records
from flowprox.summary import summary_markdown, summary_rows
from flowprox.unfolding import UnfoldedPGD

OWN_TABLES = (
    "bit-depth",
    "calibration",
    "classical",
    "ct",
    "family",
    "family-deblurring",
    "family-inpainting",
    "levels",
    "mri",
    "natural",
    "peers",
    "peers-gray",
    "pnp-flow",
    "readme",
)
RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "evaluate").glob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")


def _evaluate(recipe: EvaluationOptions, out: Path, **settings: Any) -> list[Record]:
    return evaluate(replace(recipe, out=str(out), **settings), Console(file=io.StringIO()))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        save_image(torch.rand(3, 16, 16), folder / f"p{i}.png")
    return folder


@pytest.fixture
def recipe(pictures: Path) -> EvaluationOptions:
    images = ImageOptions(str(pictures), image_size=16)
    problems = [
        EvaluatedProblem("denoising", series={"sigma": [0.1, 0.2]}, published={"measurement": [20.0, 14.0]}),
        EvaluatedProblem("inpainting", {"mask_size": 4}),
    ]
    methods = [
        EvaluatedMethod("adjoint", "measurement", batch_size=2),
        EvaluatedMethod("tv", options={"n_iterations": 3}, options_for={"inpainting": {"regularization": 0.1}}),
        EvaluatedMethod("biharmonic"),
    ]
    return EvaluationOptions(images, problems, methods, name="small")


def _fail_on(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor], bool], error: BaseException) -> list[int]:
    """Let the method fail on some measurements; returns the sizes of the batches that were given to one."""
    calls: list[int] = []

    def run(method: Reconstructor, y: Tensor, physics: Physics, kind: ProblemKind, x: Tensor) -> list[Estimate]:
        calls.append(len(y))
        if any(wrong(one) for one in y):
            raise error
        return estimate(method, y, physics, kind, x)

    monkeypatch.setattr(run_module, "estimate", run)
    return calls


# Records -------------------------------------------------------------------------------------------------------------


def test_every_method_on_every_problem_and_image_in_order(recipe: EvaluationOptions, tmp_path: Path) -> None:
    records = _evaluate(recipe, tmp_path / "out", n_pictures=1)
    problems = ["denoising-sigma0.1", "denoising-sigma0.2", "inpainting-mask_size4"]
    expected = [
        (problem, method, f"p{i}")
        for problem in problems
        for method in ("measurement", "tv", "biharmonic")
        if method != "biharmonic" or problem == problems[2]
        for i in range(3)
    ]
    assert [(r["problem"], r["method"], r["image"]) for r in records] == expected
    assert read_records(tmp_path / "out/records.jsonl") == records
    assert {r["batch"] for r in records if r["method"] == "measurement"} == {1, 2}
    last = records[-4]
    assert last["options"] == {"n_iterations": 3, "regularization": 0.1}
    assert last["parameters"]["mask_size"] == 4 and last["versions"]["torch"] == torch.__version__
    assert all(r["seconds"] >= 0 and 0 < r["ssim"] <= 1 and r["residual"] >= 0 for r in records)
    assert picture_path(tmp_path / "out", problems[0], "p0", "tv").is_file()
    assert len(list((tmp_path / "out/images").iterdir())) == 1 + 7
    assert "denoising-sigma0.2" in write_report(tmp_path / "out").read_text()


def test_devices_give_what_one_gives(recipe: EvaluationOptions, tmp_path: Path) -> None:
    one = _evaluate(recipe, tmp_path / "one")
    two = _evaluate(recipe, tmp_path / "two", devices=2)
    assert [(r["id"], r["psnr"]) for r in two] == [(r["id"], pytest.approx(r["psnr"])) for r in one]
    files = [{p.relative_to(tmp_path / run) for p in (tmp_path / run).rglob("*.*")} for run in ("one", "two")]
    assert files[0] == files[1]
    assert [r["id"] for r in read_records(tmp_path / "two/records.jsonl")] == [r["id"] for r in one]


def test_one_run_writes_to_a_folder_at_a_time(recipe: EvaluationOptions, tmp_path: Path) -> None:
    with sole_writer(tmp_path / "out"), pytest.raises(ValueError, match="another process is writing to"):
        _evaluate(recipe, tmp_path / "out")


def test_results_do_not_become_test_images(recipe: EvaluationOptions, pictures: Path) -> None:
    for out in (pictures, pictures / "results"):
        with pytest.raises(ValueError, match="lies among the images"):
            _evaluate(recipe, out)
    assert len(list(pictures.rglob("*"))) == 3


def test_missing_device_is_refused(recipe: EvaluationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="is not available: torch sees 0"):
        _evaluate(recipe, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


def test_devices_do_nothing_twice_and_what_a_killed_run_left_is_used(
    recipe: EvaluationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HereAndNow:
        """The processes' part, in this one: every share one after the other."""

        processes = ()

        def __init__(self, function: Callable[..., None], arguments: tuple[Any, ...], n: int, **options: Any) -> None:
            for rank in range(n):
                function(rank, *arguments)

        def join(self, timeout: float) -> bool:
            return True

    monkeypatch.setattr(run_module, "spawn", HereAndNow)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    calls = _fail_on(monkeypatch, lambda y: False, ValueError())
    records = _evaluate(recipe, tmp_path / "whole")
    (tmp_path / "out/images").mkdir(parents=True)
    (tmp_path / "out/images/.0123456789abcdef.tmp").touch()
    with RecordWriter(tmp_path / "out/records.jsonl") as writer:
        for record in records[::-1]:
            writer.write(record if record["image"] != "p1" else {**record, "failed": "no luck"})
    calls.clear()
    again = _evaluate(recipe, tmp_path / "out", devices=2)
    assert [r["id"] for r in again] == [r["id"] for r in read_records(tmp_path / "out/records.jsonl")]
    assert [r["id"] for r in again] == [r["id"] for r in records]
    assert calls == [1] * (len(records) // 3)
    assert not [*(tmp_path / "out").rglob(".*"), *(tmp_path / "out").glob("unfinished")]


def test_figures_are_those_of_the_method_on_the_seeded_measurement(recipe: EvaluationOptions, tmp_path: Path) -> None:
    records = _evaluate(recipe, tmp_path / "out")
    images = {i.name: i for i in load_images(recipe.images, 0, None)}
    for record in records:
        if record["method"] == "measurement" and record["problem"] == "denoising-sigma0.2":
            x = images[record["image"]].x[None]
            y = measure_each(x, make_physics("denoising", (3, 16, 16), sigma=0.2), [record["seed"]])
            assert record["psnr"] == pytest.approx(float(psnr(y, x)))
            assert record["psnr_unclipped"] == pytest.approx(float(psnr(y, x, clip=False)))
            assert record["residual"] == pytest.approx(0.0)


def test_the_hidden_pixels_of_a_masked_image_have_a_figure_of_their_own(
    recipe: EvaluationOptions, tmp_path: Path
) -> None:
    recipe = replace(recipe, problems=recipe.problems[1:], methods=recipe.methods[:1])
    for record, image in zip(_evaluate(recipe, tmp_path / "out"), load_images(recipe.images, 0, None), strict=True):
        hole = image.x[:, 6:10, 6:10]  # black in the measurement
        assert record["psnr_hidden"] == pytest.approx(-10 * float(hole.square().mean().log10()), abs=1e-4)


def test_images_that_are_not_there_name_the_remedy(recipe: EvaluationOptions, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"images\.source '.*nowhere'.*--images\.source.*--scale smoke"):
        _evaluate(replace(recipe, images=ImageOptions(str(tmp_path / "nowhere"))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_photographs_keep_their_sizes_and_networks_get_what_they_take(tmp_path: Path) -> None:
    folder, levels = tmp_path / "photographs", [0.05, 0.2]
    folder.mkdir()
    for i, size in enumerate([(16, 16), (18, 21), (16, 16)]):
        save_image(torch.rand(3, *size), folder / f"p{i}.png")
    prox = FlowProx(Glow((3, 16, 16), n_levels=2, n_steps=1, hidden_channels=4), channelwise=True, levels=levels)
    save_model(UnfoldedPGD([prox], start="adjoint", levels=levels), tmp_path / "model", {"name": "made"})
    problems = [
        EvaluatedProblem("denoising", {"sigma": 0.1}),
        EvaluatedProblem("inpainting", {"mask_size": 4}),
        EvaluatedProblem("deblurring", {"kernel_size": 5}),
    ]
    methods = [EvaluatedMethod("adjoint"), EvaluatedMethod("unfolded", model=str(tmp_path / "model"), batch_size=2)]
    recipe = EvaluationOptions(ImageOptions(str(folder), image_size=None), problems, methods, name="sizes")
    records = _evaluate(recipe, tmp_path / "out")
    assert len(records) == 18 and not any("failed" in record for record in records)
    sizes = {record["image"]: (record["height"], record["width"]) for record in records}
    assert sizes == {"p0": (16, 16), "p1": (18, 21), "p2": (16, 16)}
    assert {record["batch"] for record in records if record["image"] == "p2" and record["method"] == "unfolded"} == {2}
    assert _evaluate(recipe, tmp_path / "out") == records


def test_a_network_is_given_other_operators_than_the_measuring_one(pictures: Path, tmp_path: Path) -> None:
    prox = FlowProx(Glow((3, 16, 16), n_levels=1, n_steps=1, hidden_channels=4), channelwise=True, levels=[0.05, 0.2])
    network = UnfoldedPGD([prox], start="adjoint", levels=[0.05, 0.2], final_data_step=True).eval()
    save_model(network, tmp_path / "model", {"name": "made"})
    given = {"plain": None, "told": [{"sigma": 0.2}], "last": [{"mask_size": 8}, {}], "same": [{}]}
    methods = [
        EvaluatedMethod("unfolded", label, model=str(tmp_path / "model"), operators=operators)
        for label, operators in given.items()
    ]
    problem = EvaluatedProblem("inpainting", {"mask_size": 4, "sigma": 0.1})
    recipe = EvaluationOptions(ImageOptions(str(pictures), image_size=16, limit=1), [problem], methods)
    records = {record["method"]: record for record in _evaluate(recipe, tmp_path / "out", n_pictures=0)}
    (image,) = load_images(recipe.images, 0, 1)
    measuring, level, hole = (
        make_physics("inpainting", (3, 16, 16), **{"mask_size": 4, "sigma": 0.1, **changed})
        for changed in ({}, {"sigma": 0.2}, {"mask_size": 8})
    )
    y = measure_each(image.x[None], measuring, [image.seed])
    for label, physics in {"plain": measuring, "told": level, "last": [hole, measuring], "same": measuring}.items():
        with torch.no_grad():
            expected = psnr(network(y, physics), image.x[None]).item()
        assert records[label]["psnr"] == pytest.approx(expected, abs=1e-4)
        assert records[label].get("operators") == given[label]
    assert len({round(records[label]["psnr"], 3) for label in ("plain", "told", "last")}) == 3
    misspelt = replace(recipe, methods=[replace(methods[1], operators=[{"sigm": 0.2}])])
    with pytest.raises(ValueError, match="no parameter 'sigm'"):
        _evaluate(misspelt, tmp_path / "misspelt")


def test_noise_depends_on_seed_and_name_only(recipe: EvaluationOptions, tmp_path: Path) -> None:
    seeds = [
        {(r["image"], r["seed"]) for r in _evaluate(recipe, tmp_path / f"{seed}-{limit}", seed=seed, limit=limit)}
        for seed, limit in ((0, None), (0, 2), (1, None))
    ]
    assert len(seeds[0]) == 3 and seeds[1] < seeds[0] and not seeds[0] & seeds[2]


# Interruption and failure --------------------------------------------------------------------------------------------


def test_an_interrupted_run_continues(
    recipe: EvaluationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _evaluate(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _fail_on(patch, lambda y: float(y.abs().min()) == 0.0, KeyboardInterrupt())  # at the first masked measurement
        with pytest.raises(EvaluationInterrupted, match="12 of 21 reconstructions are recorded"):
            _evaluate(recipe, tmp_path / "out")
    path = tmp_path / "out/records.jsonl"
    path.write_bytes(path.read_bytes()[:-5])  # as a crash would leave it
    assert (tmp_path / "out/unfinished").exists()
    calls = _fail_on(monkeypatch, lambda y: False, ValueError())
    with pytest.warns(UserWarning, match="cut short"):
        again = _evaluate(recipe, tmp_path / "out")
    assert sum(calls) == 21 - 11
    assert not (tmp_path / "out/unfinished").exists()
    for one, other in zip(whole, again, strict=True):
        assert {**one, **(costs := dict.fromkeys(("seconds", "peak_memory_mib", "batch")))} == {**other, **costs}
    calls.clear()
    assert _evaluate(recipe, tmp_path / "out") == again and calls == []


def test_a_failure_is_recorded_and_tried_again(
    recipe: EvaluationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, problems=[EvaluatedProblem("denoising")], methods=recipe.methods[:1])
    seed = load_images(recipe.images, 0, None)[1].seed
    physics, x = make_physics("denoising", (3, 16, 16)), load_images(recipe.images, 0, None)[1].x
    wrong = measure_each(x[None], physics, [seed])[0]
    with monkeypatch.context() as patch:
        _fail_on(patch, lambda y: torch.equal(y, wrong), RuntimeError("no\nluck"))
        records = _evaluate(recipe, tmp_path / "out")
    assert [r.get("failed") for r in records] == [None, "RuntimeError: no luck", None]
    (row,) = summary_rows(records)
    assert (row.n_images, row.n_failed) == (2, 1)
    calls = _fail_on(monkeypatch, lambda y: False, ValueError())
    assert [r.get("failed") for r in _evaluate(recipe, tmp_path / "out")] == [None] * 3
    assert calls == [1] and len(read_records(tmp_path / "out/records.jsonl")) == 3


def test_other_options_are_not_mixed_into_earlier_records(recipe: EvaluationOptions, tmp_path: Path) -> None:
    _evaluate(recipe, tmp_path / "out")
    before = (tmp_path / "out/records.jsonl").read_bytes()
    other = replace(recipe, methods=[EvaluatedMethod("tv", options={"n_iterations": 4})])
    with pytest.raises(ValueError, match="p0, from other options"):
        _evaluate(other, tmp_path / "out")
    assert {r["id"] for r in read_records(tmp_path / "out/records.jsonl")} == {
        yaml.safe_load(line)["id"] for line in before.splitlines()
    }
    more = replace(recipe, methods=[*recipe.methods, EvaluatedMethod("tv", "tv-4", options={"n_iterations": 4})])
    assert len(_evaluate(more, tmp_path / "out")) == 30


def test_what_is_missing_is_a_row_and_keeps_nothing_from_running(
    recipe: EvaluationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bm3d", None)
    absent = EvaluatedMethod("unfolded", "later", model=str(tmp_path / "runs/later/model"), problems=["inpainting"])
    recipe = replace(recipe, methods=[recipe.methods[0], EvaluatedMethod("bm3d"), absent])
    said = io.StringIO()
    records = evaluate(replace(recipe, out=str(tmp_path / "out")), Console(file=said))
    lacking = {r["method"]: r["failed"] for r in records if "failed" in r}
    assert set(lacking) == {"bm3d", "later"} and all(text.startswith(NOT_RUN) for text in lacking.values())
    assert "pip install" in lacking["bm3d"] and "runs/later/model" in lacking["later"]
    assert sum("psnr" in r for r in records) == 9
    rows = {(row.method, row.failures) for row in summary_rows(records)}
    assert rows == {("measurement", ""), ("bm3d", "not run"), ("later", "not run")}
    assert "| bm3d | not run |" in summary_markdown(summary_rows(records))
    assert "not run: bm3d on denoising-sigma0.1" in said.getvalue()
    save_model(
        UnfoldedPGD([UNetProx(hidden_channels=4)], start="adjoint"), tmp_path / "runs/later/model", {"name": "later"}
    )
    assert {r["method"] for r in _evaluate(recipe, tmp_path / "out") if "failed" in r} == {"bm3d"}
    assert {r["method"] for r in read_records(tmp_path / "out/records.jsonl") if "failed" in r} == {"bm3d"}
    with pytest.raises(ValueError, match="no method can run"):
        _evaluate(replace(recipe, methods=[EvaluatedMethod("bm3d")]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_image_that_comes_later_changes_nothing_for_the_others(tmp_path: Path) -> None:
    for name in ("x/a", "x/b"):
        (tmp_path / "pictures/x").mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 16, 16), tmp_path / f"pictures/{name}.png")
    images = ImageOptions(str(tmp_path / "pictures"), image_size=16)
    recipe = EvaluationOptions(images, [EvaluatedProblem("denoising")], [EvaluatedMethod("adjoint")])
    before = _evaluate(recipe, tmp_path / "out")
    (tmp_path / "pictures/y").mkdir()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "pictures/y/a.jpg")
    Image.new("RGB", (16, 16), (99, 9, 9)).save(tmp_path / "pictures/x/a.jpg")
    after = _evaluate(recipe, tmp_path / "out")
    assert [r for r in after if r["image_hash"] in {r["image_hash"] for r in before}] == before
    assert len(after) == 4 == len({r["image"] for r in after})


def test_a_tuning_that_goes_on_chooses_what_it_chose(recipe: EvaluationOptions, tmp_path: Path) -> None:
    tv = EvaluatedMethod("tv", options={"n_iterations": 1}, tune={"regularization": [0.0, 1.0]})
    problem = EvaluatedProblem("denoising", {"sigma": 0.0})  # without noise, no regularization has an infinite PSNR
    recipe = EvaluationOptions(recipe.images, [problem], [tv], ImageOptions(image_size=16, limit=1))
    chosen = _evaluate(recipe, tmp_path / "out", limit=1)[0]["tuned"]
    assert _evaluate(recipe, tmp_path / "out")[2]["tuned"] == chosen == {"regularization": 0.0}


# Tuning and scales ---------------------------------------------------------------------------------------------------


def test_tuning_chooses_the_best_value_on_its_own_images(recipe: EvaluationOptions, tmp_path: Path) -> None:
    tv = EvaluatedMethod("tv", options={"n_iterations": 30}, tune={"regularization": [10.0, 0.05, 1e-6]})
    images = replace(recipe.images, limit=1)
    recipe = EvaluationOptions(images, [EvaluatedProblem("denoising", {"sigma": 0.05})], [tv], ImageOptions(limit=2))
    records = _evaluate(recipe, tmp_path / "out")
    tuning = read_records(tmp_path / "out/tuning.jsonl")
    assert [t["options"]["regularization"] for t in tuning] == [10.0, 0.05, 1e-6]
    assert {tuple(t["images"]) for t in tuning} == {("astronaut", "chelsea")}
    best = max(tuning, key=lambda t: t["psnr"])["options"]
    assert best == {"regularization": 0.05}
    assert [r["tuned"] for r in records] == [best] and records[0]["options"]["regularization"] == 0.05
    assert len(read_records(tmp_path / "out/records.jsonl")) == 1


def test_a_failed_combination_is_tried_again(
    recipe: EvaluationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tv = EvaluatedMethod("tv", options={"n_iterations": 3}, tune={"regularization": [0.1, 0.2]})
    images = replace(recipe.images, limit=1)
    recipe = EvaluationOptions(images, [EvaluatedProblem("denoising")], [tv], ImageOptions(limit=2))
    with monkeypatch.context() as patch:
        _fail_on(patch, lambda y: True, RuntimeError("no luck"))
        assert "failed" in _evaluate(recipe, tmp_path / "out")[0]
    assert "failed" not in _evaluate(recipe, tmp_path / "out")[0]


def test_a_series_of_a_method_and_published_figures(recipe: EvaluationOptions) -> None:
    methods = [
        *recipe.methods[:1],
        EvaluatedMethod("tv", series={"regularization": [0.1, 0.2], "n_iterations": [1, 2]}),
    ]
    labels = [case.label for case in planned(replace(recipe, methods=methods))]
    assert labels[1:3] == ["tv regularization=0.1 n_iterations=1", "tv regularization=0.2 n_iterations=2"]
    assert published_figures(recipe) == {
        ("denoising-sigma0.1", "measurement"): 20.0,
        ("denoising-sigma0.2", "measurement"): 14.0,
    }


def test_a_scale_has_its_own_problems_methods_and_models(recipe: EvaluationOptions) -> None:
    methods = [
        *recipe.methods[:1],
        EvaluatedMethod("unfolded", "small net", model="a", problems=["inpainting"], scales=["small"]),
        EvaluatedMethod("unfolded", "net", model="a", problems=["inpainting", "denoising-sigma0.3"]),
        EvaluatedMethod("tv", problems=["denoising-sigma0.3"], scales=["large"]),
        EvaluatedMethod("tv", options_for={"denoising-sigma0.3": {"n_iterations": 2}}),
    ]
    problems = [*recipe.problems, EvaluatedProblem("denoising", {"sigma": 0.3}, scales=["large"])]
    scales = {"large": ScaleOptions(models={"a": "b"}, image_size=32, limit=1)}
    recipe = replace(recipe, problems=problems, methods=[*methods[:3], methods[4]], scales=scales)
    small, large = (planned(at_scale(recipe, scale)) for scale in ("small", "large"))
    assert {case.problem.label for case in large} - {case.problem.label for case in small} == {"denoising-sigma0.3"}
    assert {case.method.label for case in small} - {case.method.label for case in large} == {"small net"}
    assert {case.method.model for case in small if case.method.model} == {"a"}
    assert {case.method.model for case in large if case.method.model} == {"b"}
    images = at_scale(recipe, "large").images
    assert (images.image_size, images.limit, images.source) == (32, 1, recipe.images.source)
    only_large = replace(recipe, methods=[*methods[:1], methods[3]])
    assert [case.method.label for case in planned(at_scale(only_large, "small"))] == ["measurement"] * 3
    with pytest.raises(ValueError, match="small net is for the scale huge, which the recipe has not"):
        replace(recipe, methods=[replace(methods[1], scales=["huge"])])


def test_a_scale_of_other_images_leaves_those_for_tuning_alone(recipe: EvaluationOptions) -> None:
    tv = EvaluatedMethod("tv", tune={"regularization": [0.1, 0.2]})
    scales = {"other": ScaleOptions(source="elsewhere")}
    recipe = replace(recipe, methods=[tv], tune_images=ImageOptions("faces", split="val"), scales=scales)
    other, smoke = at_scale(recipe, "other"), at_scale(recipe, "smoke")
    assert other.tune_images == recipe.tune_images and other.images.source == "elsewhere"
    assert smoke.tune_images is not None and smoke.tune_images.source == smoke.images.source == "samples"


def _method(**arguments: Any) -> Callable[[EvaluationOptions], EvaluationOptions]:
    return lambda recipe: replace(recipe, methods=[EvaluatedMethod(**arguments)])


REFUSED: dict[str, tuple[Callable[[EvaluationOptions], Any], str]] = {
    "unknown method": (_method(name="tvv"), "unknown method 'tvv'; did you mean tv"),
    "unknown option": (_method(name="tv", options={"lambda": 1}), "tv has no option 'lambda'"),
    "unknown tuned option": (_method(name="tv", options_for={"denoising": {"a": 1}}), "tv has no option 'a'"),
    "option of another problem": (_method(name="tv", options_for={"denoisin": {}}), "did you mean denoising"),
    "for no problem": (_method(name="wiener"), "wiener is used for no problem here"),
    "no flow": (_method(name="latent-map"), "latent-map needs flow"),
    "unknown flow": (_method(name="latent-map", flow="glow-face"), "nearest shipped models: glow-faces64"),
    "bad value": (_method(name="tv", options={"n_iterations": 0}), "n_iterations must be at least 1"),
    "twice": (
        lambda r: replace(r, methods=[*r.methods, EvaluatedMethod("tv")]),
        "tv on denoising-sigma0.1 stands there twice",
    ),
    "problem twice": (lambda r: replace(r, problems=[*r.problems, *r.problems]), "stands there twice"),
    "unknown parameter": (
        lambda r: replace(r, problems=[EvaluatedProblem("denoising", {"sigmaa": 1})]),
        "did you mean sigma",
    ),
    "published of nobody": (
        lambda r: replace(r, problems=[EvaluatedProblem("denoising", published={"biharmonik": 1}), *r.problems[1:]]),
        "did you mean biharmonic",
    ),
    "series of unequal length": (
        lambda r: EvaluatedProblem("denoising", series={"sigma": [1], "noise": []}),
        "list of values",
    ),
    "tuned without images": (_method(name="tv", tune={"regularization": [1]}), "give tune_images"),
    "no images": (lambda r: replace(r, images=ImageOptions("nowhere")), "nowhere"),
    "unknown scale": (lambda r: at_scale(r, "papper"), "no scale 'papper'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case: str, recipe: EvaluationOptions, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        _evaluate(change(recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Command line and recipes --------------------------------------------------------------------------------------------


def _write(path: Path, pictures: Path, **methods: Any) -> list[str]:
    recipe = {
        "images": {"source": str(pictures), "image_size": 16},
        "problems": [{"name": "denoising", "published": {"tv": 25.0}}],
        "methods": [{"name": "tv", "options": {"n_iterations": 2}, **methods}],
    }
    path.write_text(yaml.safe_dump(recipe))
    return ["evaluate", "--config", str(path), "--out", str(path.parent / "out"), "--limit", "1"]


def test_command_prints_a_table(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_write(tmp_path / "r.yaml", pictures)) == 0
    printed = capsys.readouterr().out
    assert "denoising-sigma0.2" in printed and "25.00" in printed and "95 % confidence" in printed
    table = (tmp_path / "out/summary.md").read_text()
    assert "| PSNR (dB) | denoising-sigma0.2 |" in table and "(25.00)" in table


def test_command_ends_with_status_1_after_a_failure(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fail_on(monkeypatch, lambda y: True, ValueError("never"))
    assert main(_write(tmp_path / "r.yaml", pictures)) == 1
    assert "failed: denoising-sigma0.2, tv, p0: ValueError: never" in capsys.readouterr().err


def test_the_recipe_beside_the_records_runs_again_and_holds_what_is_published(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _write(tmp_path / "r.yaml", pictures, tune={"regularization": [0.1, 1.0]})
    given = yaml.safe_load((tmp_path / "r.yaml").read_text())
    given["problems"][0]["published_in"] = "Somebody (2020)"
    given["tune_images"] = {"source": "samples", "image_size": 16, "limit": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    assert main(words) == 0
    out = tmp_path / "out"
    records, recipe = read_records(out / "records.jsonl"), (out / "recipe.yaml").read_bytes()
    assert main(["evaluate", "--config", str(out / "recipe.yaml"), "--out", str(out), "--limit", "1"]) == 0
    assert read_records(out / "records.jsonl") == records and (out / "recipe.yaml").read_bytes() == recipe
    other = [*words, "--name", "other", "--seed", "1"]  # refused: the folder holds another seed
    assert main(other) == 2 and (out / "recipe.yaml").read_bytes() == recipe
    capsys.readouterr()
    assert main(["report", str(out), "--parts", "overview", "tuning"]) == 0
    page = (out / "report.html").read_text()
    assert "Somebody (2020)" in page and "25.00" in page and "tuning of regularization" in page


def test_misspelt_key_in_a_list(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_write(tmp_path / "r.yaml", pictures, batch_sise=3)) == 2
    assert "unknown key 'batch_sise' in methods; did you mean batch_size?" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_flow() -> Glow:
    """A flow of the shipped one's shape at a fraction of its cost."""
    with torch.random.fork_rng():
        flow = Glow((3, 64, 64), n_levels=2, n_steps=1, hidden_channels=4)
        flow.initialize(torch.rand(4, 3, 64, 64))
    return flow.eval()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_in_miniature(
    path: Path, tmp_path: Path, small_flow: Glow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, device: str) -> Any:
        return small_flow if name == "glow-faces64" else load_model(name, device=device)

    monkeypatch.setattr(run_module, "load_model", load)
    monkeypatch.setattr(BM3D, "forward", lambda self, y, physics: y)  # has tests of its own, and takes most of the time
    parser = make_parser()
    options = parser.instantiate(parser.parse_args(["evaluate", "--config", str(path)]))["evaluate"]
    assert options.name == path.stem and str(options.images.source).startswith(("../shared/data/", "samples", "runs/"))
    assert main(["evaluate", "--config", str(path), "--scale", "smoke", "--out", str(tmp_path)]) == 0, (
        capsys.readouterr()
    )
    records = read_records(tmp_path / "records.jsonl")
    assert all(record["psnr"] > 0 if "psnr" in record else record["failed"].startswith(NOT_RUN) for record in records)
    assert any("psnr" in record for record in records)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_scale_of_a_recipe_can_be_planned(path: Path) -> None:
    given = make_parser()
    options = vars(given.instantiate(given.parse_args(["evaluate", "--config", str(path)]))["evaluate"])
    recipe = EvaluationOptions(**{key: value for key, value in options.items() if key != "config"})
    assert "paper" in recipe.scales or path.stem in OWN_TABLES
    for scale in recipe.scales:
        cases = planned(at_scale(recipe, scale))
        figures = published_figures(recipe, scale)
        assert cases and all(problem in {case.problem.label for case in cases} for problem, _ in figures)
