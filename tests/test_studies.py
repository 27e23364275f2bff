"""Studies: what they record holds by theory, they go on where they stopped, and every one runs from the command line."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from flowprox.cli import main
from flowprox.data import save_image
from flowprox.evaluation_options import ImageOptions
from flowprox.flows import Glow
from flowprox.records import read_records
from flowprox.studies import STUDIES, StudyOptions, StudyRun, run_study, running
from flowprox.studies.two_dimensional import bimodal_points, two_dimensional_flow

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")


def _options(**given: Any) -> StudyOptions:
    return StudyOptions(scale="smoke", console=Console(file=io.StringIO()), **given)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every study at the smallest scale, by the command."""
    made = {name: tmp_path_factory.mktemp(name) / "out" for name in STUDIES}
    for name, folder in made.items():
        assert main(["study", name, "--scale", "smoke", "--out", str(folder)]) == 0
    return made


@pytest.fixture(scope="module")
def records(folders: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    return {name: read_records(folder / "study.jsonl") for name, folder in folders.items()}


# What is recorded -----------------------------------------------------------------------------------------------------


def test_norms_begin_at_the_start(records: dict[str, list[dict[str, Any]]]) -> None:
    for record in records["latent-norms"]:
        assert record["norms"][0] == pytest.approx(record["start_norm"], rel=0.1)
        assert record["norms"][-1] == pytest.approx(record["final_norm"])
        assert record["psnr"] > 5
    assert {(r["optimizer"], r["start"]) for r in records["latent-norms"]} == {
        (name, start) for name in ("lbfgs", "adam") for start in (0.0, 0.7)
    }


def test_lbfgs_never_climbs(records: dict[str, list[dict[str, Any]]]) -> None:
    lbfgs, adam = records["solver-curves"]
    assert sorted(lbfgs["residuals"], reverse=True) == lbfgs["residuals"] and lbfgs["residuals"][-1] < 1
    assert lbfgs["residuals"][0] == pytest.approx(adam["residuals"][0])
    assert adam["evaluations_per_iteration"] == pytest.approx(4 / 3, rel=1e-5)  # three steps, and the start


def test_noise_lengthens_the_latent(records: dict[str, list[dict[str, Any]]]) -> None:
    clean, noisy = records["noisy-norms"]
    assert len(clean["norms"]) == 3
    assert all(after > before for before, after in zip(clean["norms"], noisy["norms"], strict=True))


def test_statistics_of_uniform_noise_under_the_identity_are_known() -> None:
    identity = Glow((3, 16, 16), n_levels=2, n_steps=[0, 0], hidden_channels=8)
    study, n = STUDIES["latent-statistics"], 100
    run = StudyRun({}, identity, [str(i) for i in range(n)], torch.rand(n, 3, 16, 16))
    (unit,) = study.units(run)
    record = study.measure(run, unit)
    assert record["levels"] == [1] * 6 + [2] * 24
    assert record["means"] == pytest.approx([0] * 30, abs=0.02)  # x - 1/2
    assert record["deviations"] == pytest.approx([12**-0.5] * 30, abs=0.02)
    assert record["kurtoses"] == pytest.approx([-1.2] * 30, abs=0.15)
    bits = 8 + (0.5 * math.log(2 * math.pi) + 1 / 24) / math.log(2)
    assert record["bits_per_dimension"] == pytest.approx(bits, abs=0.01)
    assert record["density"][40] == pytest.approx(1.0, abs=0.05) and record["beyond"] == 0
    assert record["norms"] == pytest.approx([(768 / 12) ** 0.5] * n, rel=0.1)


def test_no_step_changes_nothing(records: dict[str, list[dict[str, Any]]]) -> None:
    for record in records["perturbations"]:
        assert record["lengths"][0] == 0 and max(record["changes"][0]) < 1e-3 < min(record["changes"][1])


def test_the_planes_meet_at_the_true_image(records: dict[str, list[dict[str, Any]]]) -> None:
    by_plane = {record["plane"]: record for record in records["landscapes"]}
    centers = [record["misfit"][1][1] for record in by_plane.values()]
    assert centers == pytest.approx([centers[0]] * 3, rel=1e-2) and centers[0] < 0.05  # the noise, whose norm is 0.1
    assert by_plane["latent"]["prior"][1][1] == pytest.approx(by_plane["interpolation"]["prior"][1][1])
    corner = by_plane["latent"]["misfit"][0][0]
    assert corner > centers[0]


def test_every_start_is_tried_where_it_applies(records: dict[str, list[dict[str, Any]]]) -> None:
    tried = {(record["problem"], record["start"]) for record in records["starts"]}
    assert len(tried) == 9 and ("inpainting", "Lasso") not in tried
    assert all(len(record["psnr"]) == 1 and record["psnr"][0] > 0 for record in records["starts"])


def test_the_density_in_two_dimensions_integrates_to_one() -> None:
    torch.manual_seed(1)
    flow = two_dimensional_flow(n_steps=3, hidden_channels=8)
    flow.initialize(bimodal_points(500, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        axis = torch.linspace(-6, 6, 601)
        density = flow.log_prob(torch.cartesian_prod(axis, axis)[:, :, None, None]).exp()
    assert float(density.sum()) * 0.02**2 == pytest.approx(1.0, abs=0.02)


def test_training_in_two_dimensions_separates_the_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = STUDIES["two-dimensional"]
    settings = {"n_steps": 150, "batch_size": 128, "n_points": 5, "n_descent": 60}
    monkeypatch.setitem(running.STUDIES, "two-dimensional", study._replace(scales={"smoke": settings}))
    (record,) = run_study("two-dimensional", tmp_path, _options())
    assert record["log_likelihood"] > -1.0  # -0.28 is the negative entropy of the data; the best Gaussian reaches -1.39
    for name, path in record["paths"].items():
        start, end = ((0.3 - point[1]) ** 2 for point in (path[0], path[-1]))
        assert end < 0.5 * start, name


# Running --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_every_scale_gives_the_same_settings_and_more_of_them(name: str) -> None:
    study = STUDIES[name]
    assert list(study.scales) == ["smoke", "small", "paper"]
    keys = {frozenset(settings) for settings in study.scales.values()}
    numbers = [len(study.units(StudyRun(settings))) for settings in study.scales.values()]
    assert len(keys) == 1 and sorted(numbers) == numbers and numbers[0] >= 1


@pytest.mark.parametrize("name", STUDIES)
def test_figures_have_words_beside_them(name: str, folders: dict[str, Path]) -> None:
    folder = folders[name] / "figures"
    listed = json.loads((folder / "figures.json").read_text())
    assert listed and {path.name for path in folder.iterdir()} == {*listed, "figures.json"}
    for file, text in listed.items():
        assert set(text) == {"title", "caption", "alt"} and all(len(part) > 10 for part in text.values())
        with Image.open(folder / file) as picture:
            assert len(picture.convert("L").getcolors(1 << 24) or ()) > 10  # not blank


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = STUDIES["noisy-norms"]
    whole = run_study("noisy-norms", tmp_path / "whole", _options())
    measured: list[Any] = []

    def stopping(run: StudyRun, unit: Any) -> Any:
        measured.append(unit)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return study.measure(run, unit)

    monkeypatch.setitem(running.STUDIES, "noisy-norms", study._replace(measure=stopping))
    with pytest.raises(KeyboardInterrupt):
        run_study("noisy-norms", tmp_path / "out", _options())
    assert not (tmp_path / "out/figures").exists()
    assert run_study("noisy-norms", tmp_path / "out", _options()) == whole
    assert run_study("noisy-norms", tmp_path / "out", _options()) == whole
    assert [unit["sigma"] for unit in measured] == [0.0, 0.1, 0.1]


def test_records_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    run_study("noisy-norms", tmp_path, _options())
    for name, options in {"perturbations": _options(), "noisy-norms": _options(seed=1)}.items():
        with pytest.raises(ValueError, match="holds another study, or this one with other settings"):
            run_study(name, tmp_path, options)


REFUSED = {
    "unknown study": ("latent-norm", _options(), "did you mean latent-norms"),
    "unknown scale": ("latent-norms", replace(_options(), scale="smal"), "did you mean small"),
    "no flow": ("latent-norms", _options(flow="unfolded-denoising-faces64"), "is a UnfoldedPGD, not a flow"),
    "unknown flow": ("latent-norms", _options(flow="glow-face"), "nearest shipped models: glow-faces64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    name, options, message = REFUSED[case]
    with pytest.raises((ValueError, OSError), match=message):
        run_study(name, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    save_image(torch.rand(3, 16, 16), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"needs 3 images and .* has 1"):
        run_study("landscapes", tmp_path / "out", _options(images=ImageOptions(str(tmp_path / "a.png"))))


def test_command_without_a_name_lists_the_studies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in STUDIES)
    assert main(["study", "landscape"]) == 2
    assert "did you mean landscapes" in capsys.readouterr().err
