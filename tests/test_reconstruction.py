"""Files in, reconstructions out: names, sizes, seeds."""

from __future__ import annotations

import errno
import os
import re
import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepinv.models import Reconstructor
from deepinv.physics import Physics
from torch import Tensor

import flowprox
from flowprox import FlowProx, Glow, UnfoldedPGD, load_model, save_model
from flowprox.baselines import TotalVariation
from flowprox.cli import main
from flowprox.data import load_image, save_image
from flowprox.estimates import Estimate, estimate
from flowprox.flows import NonFiniteError
from flowprox.methods import METHODS, Method
from flowprox.operators import make_physics, measure_each
from flowprox.reconstruction import (
    ReconstructionInterrupted,
    ReconstructionJob,
    image_seed,
    jobs,
    reconstruct_files,
)
from flowprox.records import read_records
from flowprox.solvers import NoiseMAP, Solution, SolverInterrupted
from flowprox.solvers.objective import Objective

PACKAGE = Path(flowprox.__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small network for denoising at sigma 0.1."""
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=4)
        flow.initialize(torch.rand(8, 3, 8, 8))
        save_model(
            UnfoldedPGD([FlowProx(flow)]),
            folder,
            {"name": "tiny", "problem": {"name": "denoising", "parameters": {"sigma": 0.1}, "seed": 0}},
        )
    return str(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, size in (("one/a", (8, 8)), ("two/a", (12, 12)), ("two/b", (9, 14))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_image(torch.rand(3, *size), tmp_path / f"{name}.png")
    return tmp_path


def _simulated(model: str, **settings: Any) -> ReconstructionJob:
    return ReconstructionJob(model, measured=False, **settings)


def _failing_at(side: int, error: BaseException) -> Any:
    """The estimates, but for an image whose width is ``side``."""

    def failing(method: Reconstructor, y: Tensor, *others: Any, **named: Any) -> list[Estimate]:
        if y.shape[-1] == side:
            raise error
        return estimate(method, y, *others, **named)

    return failing


# Files ---------------------------------------------------------------------------------------------------------------


def test_names_sizes_and_figures(model: str, pictures: Path) -> None:
    out = pictures / "new" / "rec"
    records = reconstruct_files(_simulated(model), [pictures / "one/a.png", pictures / "two"], out)
    assert read_records(out / "records.jsonl") == records
    assert [record["image"] for record in records] == ["a", "a-2", "b"]
    assert [(record["height"], record["width"]) for record in records] == [(8, 8), (12, 12), (9, 14)]
    assert {record["problem"] for record in records} == {"denoising-sigma0.1"}
    expected = {
        f"{folder}{name}.{kind}"
        for folder in ("", "measurements/")
        for name in ("a", "a-2", "b")
        for kind in ("png", "npy")
    }
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == expected | {"records.jsonl"}
    assert [path.name for path in out.parent.iterdir()] == ["rec"]
    for record, path in zip(records, ("one/a.png", "two/a.png", "two/b.png"), strict=True):
        x, x_hat = load_image(pictures / path), torch.from_numpy(np.load(out / f"{record['image']}.npy"))
        assert x_hat.shape == x.shape == load_image(out / f"{record['image']}.png").shape
        mse = (x_hat.clamp(0, 1) - x).square().mean()
        assert record["psnr"] == pytest.approx(-10 * float(mse.log10()), abs=1e-3)


def test_what_is_written_is_the_network_on_the_measurement(model: str, pictures: Path) -> None:
    out = pictures / "rec"
    (record,) = reconstruct_files(_simulated(model, seed=3), [pictures / "one/a.png"], out)
    physics = make_physics("denoising", (3, 8, 8), sigma=0.1)
    y = measure_each(load_image(pictures / "one/a.png")[None], physics, [image_seed(3, "a")])
    assert record["seed"] == image_seed(3, "a")
    assert np.array_equal(np.load(out / "measurements/a.npy"), y[0])
    with torch.no_grad():
        assert np.array_equal(np.load(out / "a.npy"), load_model(model)(y, physics)[0])


def test_noise_of_an_image_does_not_depend_on_the_others(model: str, pictures: Path) -> None:
    job = _simulated(model)
    reconstruct_files(job, [pictures / "two/b.png"], pictures / "alone")
    reconstruct_files(job, [pictures / "one", pictures / "two"], pictures / "all")
    assert (pictures / "alone/b.npy").read_bytes() == (pictures / "all/b.npy").read_bytes()


def test_a_written_measurement_gives_the_same_reconstruction(model: str, pictures: Path) -> None:
    job = _simulated(model)
    reconstruct_files(job, [pictures / "two/b.png"], pictures / "first")
    (record,) = reconstruct_files(job, [pictures / "first/measurements/b.npy"], pictures / "second")
    assert "psnr" not in record
    assert (pictures / "first/b.npy").read_bytes() == (pictures / "second/b.npy").read_bytes()


def test_batches_and_measured_images(model: str, pictures: Path) -> None:
    y = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    np.save(pictures / "y.npy", y)
    job = ReconstructionJob(model, measured=True)
    records = reconstruct_files(job, [pictures / "y.npy", pictures / "one/a.png"], pictures / "rec")
    assert [record["image"] for record in records] == ["y-0", "y-1", "a"]
    assert not any("psnr" in record for record in records)
    assert np.array_equal(np.load(pictures / "rec/measurements/y-1.npy"), y[1])


@pytest.mark.parametrize("measured", [False, True])
def test_gray_picture_for_a_color_model(model: str, tmp_path: Path, measured: bool) -> None:
    save_image(torch.rand(1, 8, 8), tmp_path / "gray.png")
    reconstruct_files(ReconstructionJob(model, measured=measured), [tmp_path / "gray.png"], tmp_path / "rec")
    assert np.load(tmp_path / "rec/gray.npy").shape == (1 if measured else 3, 8, 8)  # gray noise, or noise of color


def test_problem_of_the_card_and_another_one(model: str, pictures: Path) -> None:
    source = [pictures / "one/a.png"]
    jobs = {
        "denoising-sigma0.25": _simulated(model, parameters={"sigma": 0.25}),
        "inpainting-mask_size3-sigma0.05": _simulated(
            model, problem="inpainting", parameters={"mask_size": 3, "sigma": 0.05}
        ),
        "denoising-sigma0.1": _simulated(model, problem="denoising"),
    }
    for i, (label, job) in enumerate(jobs.items()):
        assert reconstruct_files(job, source, pictures / str(i))[0]["problem"] == label


def test_random_mask_follows_the_operator_seed(model: str, pictures: Path) -> None:
    masks = []
    for seed in (None, 0, 1):
        job = _simulated(model, problem="random-inpainting", operator_seed=seed)
        reconstruct_files(job, [pictures / "one/a.png"], pictures / f"rec{seed}")
        masks.append(np.load(pictures / f"rec{seed}/measurements/a.npy") != 0)
    assert (masks[0] == masks[1]).all() and (masks[0] != masks[2]).any()


def test_a_measured_array_needs_its_random_mask(model: str, pictures: Path) -> None:
    np.save(pictures / "y.npy", np.zeros((3, 8, 8), dtype=np.float32))
    with pytest.raises(ValueError, match="need the mask they were made with"):
        reconstruct_files(ReconstructionJob(model, "random-inpainting"), [pictures / "y.npy"], pictures / "rec")
    assert not (pictures / "rec").exists()


def test_a_network_that_is_told_the_level_asks_for_it(pictures: Path) -> None:
    levels = [0.05, 0.2]
    prox = FlowProx(Glow((3, 8, 8), n_levels=2, n_steps=1, hidden_channels=4), channelwise=True, levels=levels)
    card = {
        "name": "told",
        "problem": {"name": "denoising", "parameters": {}, "ranges": {"sigma": [0, 0.2]}, "seed": 0},
    }
    save_model(UnfoldedPGD([prox], start="adjoint", levels=levels), pictures / "told", card)
    job = ReconstructionJob(str(pictures / "told"), measured=True)
    for unknown in (None, {"sigma": None}):
        with pytest.raises(ValueError, match="told the noise level of a measurement: give parameter sigma"):
            reconstruct_files(replace(job, parameters=unknown), [pictures / "two"], pictures / "out")
    for measured in (True, False):  # a clean picture gets noise of a level that is known, for a new job
        job = replace(job, measured=measured, parameters={"sigma": 0.1} if measured else None)
        assert len(reconstruct_files(job, [pictures / "two"], pictures / f"out-{measured}")) == 2


def test_a_run_folder_stands_for_its_model(model: str, pictures: Path) -> None:
    (pictures / "run").mkdir()
    shutil.copytree(model, pictures / "run/model")
    job = ReconstructionJob(str(pictures / "run"))
    assert reconstruct_files(job, [pictures / "one/a.png"], pictures / "rec")


def test_a_failure_names_the_image_and_keeps_those_before(
    model: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = {
        "diverged": (NonFiniteError("not finite"), ArithmeticError),
        "too large": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError),
        "disk": (OSError(errno.ENOSPC, "No space left on device"), OSError),
    }
    for name, (error, kind) in failures.items():
        out = pictures / name
        monkeypatch.setattr(jobs, "estimate", _failing_at(12, error))
        with pytest.raises(kind, match=r"two/a\.png.*1 of 3 images are finished|No space.*1 of 3 images are finished"):
            reconstruct_files(_simulated(model), [pictures / "one", pictures / "two"], out)
        assert {record["image"] for record in read_records(out / "records.jsonl")} == {"a"}
        assert {path.stem for path in out.rglob("*.npy")} == {"a"} and (out / "unfinished").exists()
        (out / ".0123456789abcdef.tmp").touch()  # as a kill would leave it
        monkeypatch.setattr(jobs, "estimate", estimate)
        before = (out / "a.npy").stat().st_mtime_ns
        again = reconstruct_files(_simulated(model), [pictures / "one", pictures / "two"], out)
        assert [record["image"] for record in again] == ["a", "a-2", "b"]
        assert {path.stem for path in out.glob("*.npy")} == {"a", "a-2", "b"}
        assert (out / "a.npy").stat().st_mtime_ns == before
        assert not [*out.rglob(".*"), *out.glob("unfinished")]
    monkeypatch.setattr(jobs, "estimate", _failing_at(12, ValueError("no")))
    with pytest.raises(ValueError, match=r"two/a\.png: no$"):
        reconstruct_files(_simulated(model), [pictures / "two"], pictures / "none/rec")
    assert not (pictures / "none").exists()


def test_interruption_keeps_what_is_finished(model: str, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "estimate", _failing_at(14, KeyboardInterrupt()))
    out = pictures / "new/rec"
    with pytest.raises(ReconstructionInterrupted, match="2 of 3 images are finished"):
        reconstruct_files(_simulated(model), [pictures / "one", pictures / "two"], out)
    assert [record["image"] for record in read_records(out / "records.jsonl")] == ["a", "a-2"]
    assert sorted(path.name for path in out.rglob("*.npy")) == ["a-2.npy", "a-2.npy", "a.npy", "a.npy"]
    with pytest.raises(KeyboardInterrupt):
        reconstruct_files(_simulated(model), [pictures / "two/b.png"], pictures / "nothing/rec")
    assert not (pictures / "nothing").exists()


def test_an_interrupted_solve_keeps_its_best_so_far_and_is_repeated(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Reconstructor):
        def solve(self, y: Tensor, physics: Physics) -> Solution:
            raise SolverInterrupted(Solution(y / 2, None, torch.zeros(1, 1), ["interrupted"], torch.ones(1)))

    job = ReconstructionJob(problem="denoising", method="adjoint")
    inputs = [pictures / "one", pictures / "two/b.png"]
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "adjoint", Method(Interrupted, ""))
        with pytest.raises(ReconstructionInterrupted, match="1 of 2 images are finished"):
            reconstruct_files(job, inputs, pictures / "rec")
    (record,) = read_records(pictures / "rec/records.jsonl")
    assert record["reason"] == "interrupted"
    half = np.load(pictures / "rec/measurements/a.npy") / 2
    np.testing.assert_allclose(np.load(pictures / "rec/a.npy"), half, rtol=1e-6)
    assert ["reason" in record for record in reconstruct_files(job, inputs, pictures / "rec")] == [False, False]


def test_the_folder_is_followed_kept_and_never_mixed(pictures: Path) -> None:
    (pictures / "disk").mkdir()
    (pictures / "link").symlink_to(pictures / "disk")
    job = ReconstructionJob(problem="denoising", method="adjoint")
    reconstruct_files(job, [pictures / "one"], pictures / "link")
    assert (pictures / "link").is_symlink() and (pictures / "disk/a.png").is_file()
    added = reconstruct_files(job, [pictures / "two", pictures / "one"], pictures / "link")  # in another order
    assert {record["input"][-9:]: record["image"] for record in added} == {
        "one/a.png": "a",
        "two/a.png": "a-2",
        "two/b.png": "b",
    }
    other = replace(job, seed=1)
    with pytest.raises(ValueError, match="holds results of another job"):
        reconstruct_files(other, [pictures / "one"], pictures / "disk")
    reconstruct_files(other, [pictures / "one"], pictures / "disk", overwrite=True)
    assert {path.name for path in (pictures / "disk").iterdir()} == {"a.png", "a.npy", "measurements", "records.jsonl"}
    save_image(torch.rand(3, 8, 8), pictures / "one/a.png")  # another picture under the name
    before = np.load(pictures / "disk/a.npy")
    assert len(reconstruct_files(other, [pictures / "one"], pictures / "disk")) == 1
    assert not np.array_equal(np.load(pictures / "disk/a.npy"), before)
    assert len(read_records(pictures / "disk/records.jsonl")) == 1
    with pytest.raises(FileExistsError, match="is not empty"):
        reconstruct_files(job, [pictures / "one"], pictures)


def test_any_name_that_a_file_system_has_is_written(pictures: Path) -> None:
    long = "\u6f22" * 80
    (pictures / "one/a.png").rename(pictures / f"one/{long}.png")
    os.rename(pictures / "two/a.png", os.fsencode(pictures / "two") + b"/caf\xe9.png")
    records = reconstruct_files(
        ReconstructionJob(problem="denoising", method="adjoint"), [pictures / "one", pictures / "two"], pictures / "rec"
    )
    assert [record["image"] for record in records] == [long, "b", os.fsdecode(b"caf\xe9")]
    assert all((pictures / f"rec/{record['image']}.png").is_file() for record in records)
    assert read_records(pictures / "rec/records.jsonl") == records


# What was not said ---------------------------------------------------------------------------------------------------


def test_a_photograph_given_to_a_model_is_not_degraded(model: str, pictures: Path) -> None:
    x = load_image(pictures / "one/a.png")
    (record,) = reconstruct_files(ReconstructionJob(model), [pictures / "one"], pictures / "restored")
    assert record["measured"] and "psnr" not in record and record["parameters"] == {"sigma": 0.1}
    assert "pictures are the measurements" in record["assumed"][0]
    assert np.array_equal(np.load(pictures / "restored/measurements/a.npy"), x)
    job = ReconstructionJob(problem="denoising", method="adjoint")
    (record,) = reconstruct_files(job, [pictures / "one"], pictures / "compared")
    assert not record["measured"] and "psnr" in record and "degraded first" in record["assumed"][0]
    assert reconstruct_files(_simulated(model), [pictures / "one"], pictures / "said")[0]["assumed"] == []


def test_a_blurred_photograph_is_not_taken_as_periodic(pictures: Path) -> None:
    job = ReconstructionJob(problem="deblurring", parameters={"kernel_size": 3}, method="adjoint", measured=True)
    (record,) = reconstruct_files(job, [pictures / "one"], pictures / "photo")
    assert record["parameters"]["boundary"] == "valid" and "boundary=valid" in record["assumed"][0]
    assert (record["height"], record["width"]) == load_image(pictures / "one/a.png").shape[1:]
    given = replace(job, parameters={"kernel_size": 3, "boundary": "circular"})
    assert reconstruct_files(given, [pictures / "one"], pictures / "given")[0]["assumed"] == []
    (record,) = reconstruct_files(replace(job, measured=False), [pictures / "one"], pictures / "clean")
    assert record["parameters"]["boundary"] == "circular" and record["assumed"] == []


def test_the_measurement_of_a_blur_without_border_is_continued(pictures: Path) -> None:
    job = ReconstructionJob(problem="deblurring", parameters={"kernel_size": 3}, method="measurement", measured=True)
    reconstruct_files(job, [pictures / "one"], pictures / "continued")
    x = load_image(pictures / "one/a.png")
    torch.testing.assert_close(load_image(pictures / "continued/a.png"), x)


def test_pictures_and_arrays_of_a_blur_do_not_share_a_border(pictures: Path) -> None:
    np.save(pictures / "blurred.npy", load_image(pictures / "one/a.png").numpy())
    job = ReconstructionJob(problem="deblurring", parameters={"kernel_size": 3}, method="adjoint", measured=True)
    (record,) = reconstruct_files(job, [pictures / "blurred.npy"], pictures / "array")
    assert "boundary=circular" in record["assumed"][0]
    (record,) = reconstruct_files(replace(job, method="wiener"), [pictures / "one"], pictures / "wiener")
    assert record["parameters"]["boundary"] == "circular" and "boundary=circular" in record["assumed"][0]
    with pytest.raises(ValueError, match="give parameter boundary"):
        reconstruct_files(job, [pictures / "one", pictures / "blurred.npy"], pictures / "both")


def test_another_mask_under_the_same_name_is_another_job(pictures: Path) -> None:
    mask = np.ones(load_image(pictures / "one/a.png").shape[1:], dtype=np.float32)
    job = ReconstructionJob(
        problem="inpainting", parameters={"mask": str(pictures / "mask.npy")}, method="adjoint", measured=True
    )
    np.save(pictures / "mask.npy", mask)
    reconstruct_files(job, [pictures / "one"], pictures / "masked")
    mask[0] = 0
    np.save(pictures / "mask.npy", mask)
    with pytest.raises(ValueError, match="results of another job"):
        reconstruct_files(job, [pictures / "one"], pictures / "masked")


def test_a_size_that_does_not_fit_is_that_of_the_file(pictures: Path) -> None:
    for problem, parameters, behind in (
        ("super-resolution", {"factor": 2}, "size 9x14 and shows an image of 18x28"),
        ("inpainting", {"mask": np.ones((9, 14))}, "size 9x14,"),
    ):
        job = ReconstructionJob(None, problem, parameters, True, method="latent-map", flow="glow-faces64", pad=False)
        with pytest.raises(ValueError, match=f"{behind}.* the model needs multiples of 8"):
            reconstruct_files(job, [pictures / "two/b.png"], pictures / "out")


def test_within_plug_and_play_a_network_is_used_for_denoising(pictures: Path) -> None:
    remarks = {
        "unfolded-denoising-natural": [],
        "unfolded-inpainting-faces64": ["inpainting and is used for denoising"],
    }
    for name, expected in remarks.items():
        job = ReconstructionJob(name, "super-resolution", {"factor": 2, "sigma": 0.01}, True, method="plug-and-play")
        job = replace(job, options={"n_iterations": 1})
        (record,) = reconstruct_files(job, [pictures / "one"], pictures / name)
        assert [remark.partition("trained for ")[2] for remark in record["assumed"]] == expected


def test_a_network_beyond_its_training_is_used_with_a_warning(model: str, pictures: Path) -> None:
    jobs_and_words = [
        (replace(_simulated(model), parameters={"sigma": 0.25}), "trained with sigma 0.0 to 0.1 and is used with 0.25"),
        (
            replace(_simulated(model), problem="inpainting", parameters={"mask_size": 3}),
            "was trained for denoising and is used for inpainting",
        ),
    ]
    for i, (job, words) in enumerate(jobs_and_words):
        (record,) = reconstruct_files(job, [pictures / "one"], pictures / str(i))
        assert words in record["assumed"][0]


# Methods without training --------------------------------------------------------------------------------------------


def test_a_method_by_name_is_that_method_on_the_measurement(pictures: Path) -> None:
    options = {"n_iterations": 3, "regularization": 0.1}
    job = ReconstructionJob(problem="denoising", method="tv", options=options)
    (record,) = reconstruct_files(job, [pictures / "two/b.png"], pictures / "rec")
    assert (record["method"], record["options"]) == ("tv", options)
    physics = make_physics("denoising", (3, 9, 14))
    y = torch.from_numpy(np.load(pictures / "rec/measurements/b.npy"))[None]
    expected = TotalVariation(0.1, 3, dual_step=0.05)(y, physics)
    assert np.array_equal(np.load(pictures / "rec/b.npy"), expected[0])


@pytest.mark.parametrize(
    ("problem", "parameters"),
    [("compressed-sensing", {"m": 40}), ("super-resolution", {"factor": 2}), ("mri", {}), ("ct", {"n_angles": 5})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_written_measurements_of_any_form_give_the_same_reconstruction(
    problem: str, parameters: dict[str, Any], pictures: Path
) -> None:
    job = ReconstructionJob(problem=problem, parameters=parameters, method="adjoint", operator_seed=3, size=(3, 12, 12))
    reconstruct_files(job, [pictures / "two/a.png"], pictures / "first")
    is_picture = problem == "super-resolution"
    assert (pictures / "first/measurements/a.png").exists() == is_picture
    (record,) = reconstruct_files(job, [pictures / "first/measurements/a.npy"], pictures / "second")
    assert (record["height"], record["width"]) == (12, 12)
    first, second = (np.load(pictures / run / "a.npy") for run in ("first", "second"))
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_one_bit_figures_do_not_depend_on_the_scale(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"n_iterations": 1}
    job = ReconstructionJob(problem="one-bit", parameters={"m": 60}, method="noise-map", options=options)
    figures = []
    for scale in (1.0, 0.2):
        x_hat = scale * torch.ones(1, 3, 16, 16)
        monkeypatch.setattr(NoiseMAP, "solve", lambda self, y, physics, x_hat=x_hat: x_hat)
        save_image(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)), pictures / "c.png")
        (record,) = reconstruct_files(job, [pictures / "c.png"], pictures / f"rec{scale}")
        figures.append((record["psnr"], record["ssim"]))
    assert figures[0] == pytest.approx(figures[1])


def test_ten_frames_from_the_command_to_the_objective(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value, stacks = Objective.value, []

    def watched(self: Objective, u: Tensor) -> Tensor:
        ours = [Path(frame.filename) for frame in traceback.extract_stack() if str(PACKAGE) in frame.filename]
        command = next(i for i, path in enumerate(ours) if path.parts[-2:] == ("commands", "reconstruct.py"))
        stacks.append(ours[command:])
        return value(self, u)

    monkeypatch.setattr(Objective, "value", watched)
    save_image(torch.rand(3, 16, 16), pictures / "c.png")
    words = [
        "--method=latent-map",
        "--problem=compressed-sensing",
        "--parameters",
        "m=40",
        "--options",
        "n_iterations=1",
    ]
    assert main(["reconstruct", str(pictures / "c.png"), "--out", str(pictures / "rec"), *words]) == 0
    assert stacks and max(len(stack) + 1 for stack in stacks) <= 10  # and the objective itself


SENSING = ReconstructionJob(problem="compressed-sensing", parameters={"m": 40}, method="adjoint", operator_seed=0)
REFUSED: dict[str, tuple[ReconstructionJob, str]] = {
    "no size": (SENSING, "does not tell the size"),
    "another size": (replace(SENSING, size=(6, 6), parameters={"m": 39}), "the operator measures (39,)"),
    "three sizes": (replace(SENSING, size=(1, 6, 6, 6)), "size must be"),
    "unknown matrix": (replace(SENSING, size=(6, 6), operator_seed=None), "need the matrix they were made with"),
    "no method": (ReconstructionJob(problem="denoising"), "give a method"),
    "no problem": (ReconstructionJob(method="tv"), "give one with problem"),
    "not for this problem": (
        ReconstructionJob(None, "deblurring", {"kernel_size": 3}, method="bm3d"),
        "bm3d is not for",
    ),
    "a flow of images as noise": (
        ReconstructionJob(problem="denoising", method="noise-map", noise="glow-faces64"),
        "is a flow of images",
    ),
    "unknown option": (replace(SENSING, method="tv", options={"regularisation": 1}), "did you mean regularization"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    job, message = REFUSED[case]
    np.save(tmp_path / "y.npy", np.zeros((3, 6, 6) if job.problem != "compressed-sensing" else 40, dtype=np.float32))
    with pytest.raises(ValueError, match=re.escape(message)):
        reconstruct_files(job, [tmp_path / "y.npy"], tmp_path / "rec")
    assert not (tmp_path / "rec").exists()
