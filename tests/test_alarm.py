"""The alarm is silent for images like those it was made of, and raised for another noise, operator or kind of image."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import flowprox
from flowprox import FlowProx, Glow, UnfoldedPGD, load_model, make_physics, save_model
from flowprox.cli import main
from flowprox.data import save_image
from flowprox.estimates import calibration_of, doubts_of, estimate
from flowprox.evaluation.report import write_report
from flowprox.evaluation.run import evaluate
from flowprox.operators import PROBLEMS, Problem, measure_each
from flowprox.options import EvaluatedMethod, EvaluatedProblem, EvaluationOptions, ImageOptions
from flowprox.records import read_records
from flowprox.uncertainty import Alarm, Intervals, ScaleNet, fit_alarm, residual_p_value, uniform_p_value

SIGMA, SIDE = 0.1, 8


def squares(n: int, seed: int) -> Tensor:
    """Gray squares of 4x4 pixels, slightly tinted: images (n, 3, 8, 8) of one kind."""
    generator = torch.Generator().manual_seed(seed)
    gray = torch.rand(n, 1, 2, 2, generator=generator).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return (0.1 + 0.7 * gray + 0.1 * torch.rand(n, 3, 1, 1, generator=generator)).clamp(0, 1)


class World(NamedTuple):
    """A network, its folder, and intervals with an alarm, whose folder is the network's with "-intervals"."""

    network: UnfoldedPGD
    alarm: Alarm
    folder: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("alarm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Glow((3, SIDE, SIDE), n_levels=2, n_steps=1, hidden_channels=4)
        flow.initialize(squares(64, 9))
    problem = {"name": "denoising", "parameters": {"sigma": SIGMA}, "seed": 0}
    card = save_model(UnfoldedPGD([FlowProx(flow)]).eval(), folder / "network", {"problem": problem})
    facts = {"problem": problem, "training": {"model_sha256": card.sha256}}
    save_model(Intervals(ScaleNet(3, 4, 1), 0.1), folder / "plain", facts)
    content = [io.BytesIO() for _ in range(700)]
    for x, buffer in zip(squares(700, 1), content, strict=True):
        pixels = (255 * x).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "PNG")
    parts = [buffer.getvalue() for buffer in content]
    offsets = np.cumsum([0, *map(len, parts)])
    np.savez(folder / "shard.npz", webp=np.frombuffer(b"".join(parts), np.uint8), offsets=offsets)
    words = [str(folder / "network"), str(folder / "shard.npz"), f"--out={folder / 'network-intervals'}"]
    words += [f"--intervals={folder / 'plain'}", f"--image_size={SIDE}", "--samples", "--n_training=50", "--n_steps=10"]
    assert main(["calibrate", *words, f"--training={folder / 'shard.npz'}"]) == 0
    alarm = load_model(folder / "network-intervals").alarm
    return World(load_model(folder / "network"), alarm, folder)


def raised(world: World, x: Tensor) -> Tensor:
    """Whether the alarm is raised for images (B, C, H, W)."""
    physics = make_physics("denoising", (3, SIDE, SIDE), sigma=SIGMA)
    y = measure_each(x, physics, range(500, 500 + len(x)))
    with torch.no_grad():
        x_hat = world.network(y, physics)
    return world.alarm.is_raised(world.alarm.scores(x_hat, y, physics, world.network.flows()[-1]))


def test_it_is_silent_for_its_own_kind_and_raised_for_others(world: World) -> None:
    assert len(world.alarm.reference) == 350
    x = squares(400, 2)
    assert raised(world, x).double().mean() < 0.035  # one in a hundred, four standard errors above
    assert raised(world, torch.rand(50, 3, SIDE, SIDE)).all()


def test_a_prior_looks_at_the_estimates(world: World) -> None:
    """The alarm names the flow that it was made with, and refuses another in its place."""
    flow = Glow((3, SIDE, SIDE), n_levels=1, n_steps=1, hidden_channels=4).eval()
    card = save_model(flow, world.folder / "prior", {})
    words = [str(world.folder / "network"), str(world.folder / "shard.npz"), f"--out={world.folder / 'watched'}"]
    words += [
        f"--intervals={world.folder / 'network-intervals'}",
        f"--image_size={SIDE}",
        f"--prior={world.folder / 'prior'}",
    ]
    assert main(["calibrate", *words]) == 0
    watched = load_model(world.folder / "watched")
    assert watched.alarm.prior == str(world.folder / "prior") and watched.card.training["prior_sha256"] == card.sha256
    assert watched.alarm.sizes["prior means"] == watched.alarm.sizes["prior latents"] == flow.n_latent_groups
    problem = make_physics("denoising", (3, SIDE, SIDE), sigma=SIGMA)
    (doubt,) = doubts_of(world.network, watched)(squares(1, 3), squares(1, 3), problem)
    assert doubt["residual"] < 0.05  # y without noise
    save_model(Glow((3, SIDE, SIDE), n_levels=1, n_steps=1, hidden_channels=8), world.folder / "prior", {})
    with pytest.raises(ValueError, match="the alarm was made with a prior"):
        doubts_of(world.network, watched)


def test_a_folder_that_hides_the_prior_takes_the_shipped_alarm_away_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, problem = load_model("unfolded-denoising-faces64"), Problem("denoising", {"sigma": 0.2})
    shipped = calibration_of(network, problem)
    assert shipped is not None and doubts_of(network, shipped) is not None
    save_model(Glow((3, SIDE, SIDE), n_levels=1, n_steps=1, hidden_channels=4), tmp_path / "glow-faces64", {})
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="no alarm: another model 'glow-faces64'"):
        shipped = calibration_of(network, problem)
    assert shipped is not None and doubts_of(network, shipped) is None


def test_p_values_are_uniform() -> None:
    """The estimate is the image, so that residual, latents and density are independent draws of one kind."""
    flow = Glow((1, 4, 4), n_levels=1, n_steps=1, hidden_channels=4).eval()
    physics = make_physics("denoising", (1, 4, 4), sigma=SIGMA)
    x = torch.rand(3000, 1, 4, 4)
    y = physics(x)
    alarm = fit_alarm([(x[:2000], y[:2000])], physics, flow)
    p_values = alarm(x[2000:], y[2000:], physics, flow)
    assert min(uniform_p_value(one) for one in p_values.T) > 1e-3
    louder = x[2000:] + 2.5 * (y[2000:] - x[2000:])
    assert alarm.is_raised(alarm.scores(x[2000:], louder, physics, flow)).double().mean() > 0.9


def test_a_wrong_kernel_is_seen_where_the_residual_is_not_larger() -> None:
    """What the network cannot know: the estimate is the image, blurred with another kernel than stated."""
    flow = Glow((1, 16, 16), n_levels=1, n_steps=1, hidden_channels=4).eval()
    stated, other = (
        make_physics("deblurring", (1, 16, 16), sigma_blur=s, kernel_size=5, sigma=0.05) for s in (1.5, 2.0)
    )
    x = torch.rand(1200, 1, 4, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    alarm = fit_alarm([(x[:1000], stated(x[:1000]))], stated, flow)
    scores = {}
    for name, physics in (("stated", stated), ("other", other)):
        y = physics(x[1000:])
        scores[name] = alarm(x[1000:], y, stated, flow)
    assert uniform_p_value(scores["stated"][:, 3]) > 1e-3 and scores["other"][:, 3].median() < 0.01
    assert scores["other"][:, 0].median() > 0.05


def clipped(y: Tensor) -> Tensor:
    """As a picture of 8 bits is."""
    return (255 * y.clamp(0, 1)).round() / 255


def test_a_clipped_picture_is_no_reason_to_doubt(world: World) -> None:
    """Half of the images have most of their pixels near the ends, and half of the noise of these beyond."""
    x = squares(1000, 4)
    x[::2] = (x[::2] - 0.5).mul(8).add(0.5).clamp(0.01, 0.99)
    physics = make_physics("denoising", x.shape[1:], sigma=SIGMA)
    y = measure_each(x, physics, range(len(x)))
    for seen, tolerated in ((y.clamp(0, 1), 1e-3), (clipped(y), 1e-4)):
        assert ((seen == 0) | (seen == 1)).double().mean() > 0.15
        p_values = residual_p_value(x, seen, physics)
        assert p_values is not None and uniform_p_value(p_values) > tolerated
        p_values = residual_p_value(x, clipped(x + 1.25 * (y - x)), physics)
        assert p_values is not None and (p_values < 0.01).double().mean() > 0.5
    alarm, flow = fit_alarm([(x, y)], physics, world.network.flows()[-1]), world.network.flows()[-1]
    p_values = alarm(x, clipped(y), physics, flow)[:, 0]
    assert (p_values <= 0.01).double().mean() < 0.03
    assert (alarm(x, clipped(x + 1.25 * (y - x)), physics, flow)[:, 0] <= 0.01).double().mean() > 0.3


def test_the_residual_of_the_truth_has_uniform_p_values() -> None:
    x = torch.rand(2000, 1, 4, 4)
    for name, parameters in (("denoising", {"sigma": 0.2}), ("inpainting", {"sigma": 0.2, "mask_size": 2})):
        physics = make_physics(name, (1, 4, 4), **parameters)
        p_values = residual_p_value(x, physics(x), physics)
        assert p_values is not None and uniform_p_value(p_values) > 1e-3
    assert residual_p_value(x, x, make_physics("denoising", (1, 4, 4), sigma=0.0)) is None  # no noise


def test_alarms_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 99 reference images, got 98"):
        Alarm({"residual": 1}, 98)
    with pytest.raises(ValueError, match="sizes must be a mapping, got"):
        Alarm([1, 3, 1], 99)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 2"):
        Alarm({"residual": 1}, 98, level=2)


def test_reconstruct_says_what_is_not_to_be_trusted(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    save_image(squares(1, 3)[0], world.folder / "usual.png")
    save_image(torch.eye(SIDE).expand(3, -1, -1), world.folder / "strange.png")
    pictures = [str(world.folder / name) for name in ("usual.png", "strange.png")]
    words = ["--model", str(world.folder / "network"), "--simulate", "--intervals"]
    out = world.folder / "out"
    assert main(["reconstruct", *pictures, "--out", str(out), *words, str(world.folder / "network-intervals")]) == 0
    shown = capsys.readouterr().out
    assert "not to be trusted: strange, unlike the images of the calibration" in shown
    assert "trusted: usual" not in shown
    records = {record["image"]: record for record in read_records(out / "records.jsonl")}
    assert records["strange"]["alarm"]["raised"] and not records["usual"]["alarm"]["raised"]
    assert {"residual", "latents", "layout"} < records["usual"]["alarm"].keys()
    noisy = squares(1, 3)[0] + 2 * SIGMA * torch.randn(3, SIDE, SIDE)
    np.save(world.folder / "noisy.npy", noisy.numpy())
    words = ["reconstruct", str(world.folder / "noisy.npy"), "--problem=denoising", "--parameters", f"sigma={SIGMA}"]
    assert main([*words, "--model=unfolded-denoising-natural", f"--out={world.folder / 'told'}"]) == 0
    assert "noisy, the measurement is further from it than the stated noise explains" in capsys.readouterr().out
    assert main([*words, "--method=tv", f"--out={world.folder / 'tv'}"]) == 0  # leaves what its weight leaves
    assert "not to be trusted" not in capsys.readouterr().out


def test_a_shipped_calibration_is_used_for_its_problem_only(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowprox.estimates.list_models", lambda: ["network-intervals"])
    monkeypatch.setattr("flowprox.estimates.load_model", lambda name, device: load_model(world.folder / name, device))
    assert calibration_of(world.network, Problem("denoising", {"sigma": 0.2})) is None
    problem = Problem("denoising", {"sigma": SIGMA})
    physics = make_physics(problem, (3, SIDE, SIDE))
    doubts = doubts_of(world.network, calibration_of(world.network, problem))
    (found,) = estimate(world.network, torch.rand(1, 3, SIDE, SIDE), physics, PROBLEMS["denoising"], doubts=doubts)
    assert found.facts["alarm"]["raised"]
    with pytest.warns(UserWarning, match="the result is not to be trusted"):
        restored = flowprox.restore(torch.eye(SIDE).expand(3, -1, -1), model=world.network)
    assert restored.alarm is not None and restored.alarm["raised"]
    card = replace(world.network.card, name="another")
    network = load_model(world.folder / "network")
    network.card = card
    assert calibration_of(network, problem) is None


def test_reconstruct_draws_samples(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    save_image(squares(1, 3)[0], world.folder / "usual.png")
    words = ["reconstruct", str(world.folder / "usual.png"), "--model", str(world.folder / "network"), "--simulate"]
    calibrated = ["--intervals", str(world.folder / "network-intervals"), "--samples=3"]
    for name in ("first", "second"):
        assert main([*words, *calibrated, "--out", str(world.folder / name)]) == 0
        (record,) = read_records(world.folder / name / "records.jsonl")
        deviation = np.load(world.folder / name / "deviations/usual.npy")
        assert record["samples"] == 3 and record["mean_deviation"] == pytest.approx(deviation.mean(), rel=1e-4)
        assert deviation.min() > 0
    pictures = [sorted((world.folder / name / "samples/usual").iterdir()) for name in ("first", "second")]
    contents = [[path.read_bytes() for path in paths] for paths in pictures]
    assert contents[0] == contents[1] and len(set(contents[0])) == 3
    refused = [*words, "--out", str(world.folder / "refused")]
    assert main([*refused, "--intervals", str(world.folder / "plain"), "--samples=3"]) == 2
    assert "has no density of denoising-sigma0.1 to draw samples from" in capsys.readouterr().err
    assert main([*refused, *calibrated[:2], "--samples=1"]) == 2
    assert "samples must be at least 2" in capsys.readouterr().err
    assert not (world.folder / "refused").exists()


def test_an_evaluation_draws_what_intervals_are_worth(world: World) -> None:
    intervals = str(world.folder / "network-intervals")
    method = EvaluatedMethod("unfolded", model=str(world.folder / "network"), intervals=intervals)
    images = ImageOptions(str(world.folder / "shard.npz"), image_size=SIDE, limit=40)
    problems = [EvaluatedProblem("denoising", {"sigma": SIGMA})]
    recipe = EvaluationOptions(images, problems, [method], out=str(world.folder / "run"), n_pictures=1)
    records = evaluate(recipe, Console(quiet=True))
    for record in records:
        facts = record["calibration"]
        assert facts["alpha"] == 0.1 and facts["widths"] == sorted(facts["widths"]) and len(facts["errors"]) == 10
        assert np.mean(facts["coverages"]) == pytest.approx(facts["coverage"], abs=0.02)  # tenths of 192 are 19 or 20
        assert np.mean(facts["widths"]) == pytest.approx(facts["mean_half_width"], rel=0.02)
        assert len(facts["ranks"]) == 4 and all(0 <= rank <= facts["n_ranked"] for rank in facts["ranks"])
        assert facts["crps"] > 0 and 0 <= facts["tarp"] < 1
    page = write_report(world.folder / "run").read_text(encoding="utf-8")
    for words in (
        "Coverage by image",
        "Coverage by width",
        "Error over width",
        "Ranks of the truth",
        "p-values of the ranks",
        "half-widths of",
    ):
        assert words in page
    other = replace(recipe, problems=[EvaluatedProblem("denoising", {"sigma": 0.3})])
    with pytest.raises(ValueError, match=r"calibrated for denoising-sigma0.1, not for denoising-sigma0.3"):
        evaluate(other, world.folder / "refused-run")
