"""Scripts of the gallery: every one draws at the smallest scale, and what they record holds by theory."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from flowprox.data import save_image
from flowprox.flows import Flow, Sequential, Split, Squeeze, Unsqueeze
from flowprox.records import read_records

GALLERY = Path(__file__).parents[1] / "docs" / "gallery" / "papers"
NAMES = sorted(path.stem for path in GALLERY.glob("*.py") if path.stem != "common")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning"),
    pytest.mark.xdist_group("gallery"),  # the scripts run once
]


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The scripts as modules, which import what they share as Python does for a script: from their own folder."""
    sys.path.insert(0, str(GALLERY))
    try:
        return {name: importlib.import_module(name) for name in ["common", *NAMES]}
    finally:
        sys.path.remove(str(GALLERY))


@pytest.fixture(scope="module")
def folders(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The results of every script at the smallest scale."""
    made = {name: tmp_path_factory.mktemp(name) / "out" for name in NAMES}
    for name, folder in made.items():
        scripts[name].main(["--scale", "smoke", "--out", str(folder)])
    return made


@pytest.fixture(scope="module")
def records(folders: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    return {name: read_records(folder / f"{name.replace('_', '-')}.jsonl") for name, folder in folders.items()}


# What is recorded -----------------------------------------------------------------------------------------------------


def test_norms_begin_at_the_start(records: dict[str, list[dict[str, Any]]]) -> None:
    for record in records["latent_norms"]:
        assert record["norms"][0] == pytest.approx(record["start_norm"], rel=0.1)
        assert record["norms"][-1] == pytest.approx(record["final_norm"])
        assert record["psnr"] > 5
    assert {(r["optimizer"], r["start"]) for r in records["latent_norms"]} == {
        (name, start) for name in ("lbfgs", "adam") for start in (0.0, 0.7)
    }


def test_lbfgs_never_climbs(records: dict[str, list[dict[str, Any]]]) -> None:
    lbfgs, adam = records["solver_curves"]
    assert sorted(lbfgs["residuals"], reverse=True) == lbfgs["residuals"] and lbfgs["residuals"][-1] < 1
    assert lbfgs["residuals"][0] == pytest.approx(adam["residuals"][0])
    assert adam["evaluations_per_iteration"] == pytest.approx(4 / 3, rel=1e-5)  # three steps, and the start


def test_noise_lengthens_the_latent(records: dict[str, list[dict[str, Any]]]) -> None:
    clean, noisy = records["noisy_norms"]
    assert len(clean["norms"]) == 3
    assert all(after > before for before, after in zip(clean["norms"], noisy["norms"], strict=True))


def test_statistics_of_uniform_noise_under_the_identity_are_known(scripts: dict[str, ModuleType]) -> None:
    levels = Sequential([Squeeze(), Split(Sequential([Squeeze(), Unsqueeze()])), Unsqueeze()])
    n, identity = 100, Flow(levels, (3, 16, 16), 2)
    names, x = [str(i) for i in range(n)], torch.rand(n, 3, 16, 16)
    scene = scripts["common"].Scene("any", Path(), "smoke", {}, 0, "cpu", {}, identity, names, x)
    record = scripts["latent_statistics"].measure(scene, {})
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
        assert max(record["changes"][0]) < 1e-3 < min(record["changes"][1])


def test_the_planes_meet_at_the_true_image(records: dict[str, list[dict[str, Any]]]) -> None:
    by_plane = {record["plane"]: record for record in records["landscapes"]}
    centers = [record["misfit"][1][1] for record in by_plane.values()]
    assert centers == pytest.approx([centers[0]] * 3, rel=1e-2) and centers[0] < 0.05  # the noise, whose norm is 0.1
    assert by_plane["latent"]["prior"][1][1] == pytest.approx(by_plane["interpolation"]["prior"][1][1])
    assert by_plane["latent"]["misfit"][0][0] > centers[0]


def test_every_start_is_tried_where_it_applies(records: dict[str, list[dict[str, Any]]]) -> None:
    tried = {(record["problem"], record["start"]) for record in records["starts"]}
    assert len(tried) == 9 and ("inpainting", "Lasso") not in tried
    assert all(len(record["psnr"]) == 1 and record["psnr"][0] > 0 for record in records["starts"])


def test_the_density_in_two_dimensions_integrates_to_one(scripts: dict[str, ModuleType]) -> None:
    torch.manual_seed(1)
    flow = scripts["two_dimensional"].two_dimensional_flow(n_steps=3, width=8)
    flow.initialize(scripts["two_dimensional"].bimodal_points(500, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        axis = torch.linspace(-6, 6, 301)
        points = torch.cartesian_prod(axis, axis)[:, :, None, None]
        density = flow.log_prob(points).exp()
        assert float((flow.decode(flow.encode(points[:50]), (1, 1)) - points[:50]).abs().max()) < 1e-4
    assert float(density.sum()) * 0.04**2 == pytest.approx(1.0, abs=0.02)


def test_training_in_two_dimensions_separates_the_modes(scripts: dict[str, ModuleType]) -> None:
    settings = {"n_steps": 120, "batch_size": 128, "n_points": 5, "n_descent": 60}
    module = scripts["two_dimensional"]
    scene = module.scene_of("two-dimensional", module.SCALES, ["--scale", "smoke"], needs_flow=False)
    record = module.measure(replace(scene, settings=settings), {})
    assert record["log_likelihood"] > -1.0  # -0.28 is the negative entropy of the data; the best Gaussian reaches -1.39
    for name, path in record["paths"].items():
        start, end = ((0.3 - point[1]) ** 2 for point in (path[0], path[-1]))
        assert end < 0.5 * start, name


# Scripts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_scripts_say_what_they_show_and_scales_differ_in_numbers_only(
    name: str, scripts: dict[str, ModuleType]
) -> None:
    title, rule, *text = str(scripts[name].__doc__).strip().splitlines()
    assert set(rule) == {"="} and len(rule) == len(title)
    assert "After Asim et al. 2020" in " ".join(" ".join(text).split())
    scales = scripts[name].SCALES
    assert list(scales) == ["smoke", "small", "paper"] and len({frozenset(scale) for scale in scales.values()}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_figures_have_words_beside_them(name: str, folders: dict[str, Path]) -> None:
    folder = folders[name] / "figures"
    listed = json.loads((folder / "figures.json").read_text())
    assert listed and {path.name for path in folder.iterdir()} == {*listed, "figures.json"}
    for file, text in listed.items():
        assert set(text) == {"title", "caption", "alt"} and all(len(part) > 10 for part in text.values())
        with Image.open(folder / file) as picture:
            assert len(picture.convert("L").getcolors(1 << 24) or ()) > 10  # not blank


def test_an_interrupted_script_goes_on_and_runs_are_not_mixed(
    scripts: dict[str, ModuleType], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, arguments = scripts["noisy_norms"], ["--scale", "smoke", "--out", str(tmp_path)]
    measured: list[float] = []
    measure = module.measure

    def stopping(scene: Any, unit: Any) -> Any:
        measured.append(unit["sigma"])
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(scene, unit)

    monkeypatch.setattr(module, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        module.main(arguments)
    assert not (tmp_path / "figures").exists()
    module.main(arguments)
    whole = folders["noisy_norms"] / "noisy-norms.jsonl"
    assert (tmp_path / "noisy-norms.jsonl").read_bytes() == whole.read_bytes() and measured == [0.0, 0.1, 0.1]
    with pytest.raises(SystemExit, match="holds another run"):
        module.main([*arguments, "--seed", "1"])


REFUSED = {
    "unknown scale": (["--scale", "smal"], "invalid choice: 'smal'"),
    "no flow": (["--scale", "smoke", "--flow", "unfolded-denoising-faces64"], "is a UnfoldedPGD, not a flow"),
    "too few images": (["--scale", "smoke", "--images", "{}/a.png"], "has 1 images; the figure needs 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(
    case: str, scripts: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(torch.rand(3, 16, 16), tmp_path / "a.png")
    arguments, message = REFUSED[case]
    with pytest.raises(SystemExit):
        scripts["noisy_norms"].main([*(word.format(tmp_path) for word in arguments), "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
