"""A page on one's own machine: give it a picture, say what was measured, and see what the methods make of it.

The page needs the extra ``app`` (gradio). Its server answers this machine alone, and nothing is sent elsewhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from flowprox.checkpoints import load_model
from flowprox.data import load_image
from flowprox.methods import make_method
from flowprox.naming import require_package
from flowprox.operators import Problem, make_physics
from flowprox.restoration import Restored, restore
from flowprox.samples import SAMPLES_FOLDER
from flowprox.solvers import LBFGS
from flowprox.solvers.optimizers import Evaluate, Trace

NETWORK, FLOW = "unfolded-denoising-natural", "glow-faces64"
PROBLEMS = ("denoising", "inpainting", "deblurring")
SIDES = {"network": 512, "latent-map": 128, "posterior": 64}
"""Method -> longest side in pixels; a larger picture is scaled down, so that an answer takes seconds."""


@dataclass(frozen=True)
class _WatchedLBFGS(LBFGS):
    """L-BFGS that notes the objective while it works."""

    losses: list[float] = field(default_factory=list)

    def minimize(self, evaluate: Evaluate, z: Tensor, scales: Tensor | None = None) -> Trace:
        def watched(z: Tensor) -> tuple[Tensor, Tensor]:
            f, g = evaluate(z)
            self.losses.append(float(f.min()))
            return f, g

        return super().minimize(watched, z, scales)


@dataclass(frozen=True)
class Request:
    """What the page asks for.

    Arguments:
        problem: one of ``PROBLEMS``.
        sigma: standard deviation of the noise, of an image range [0, 1].
        width: standard deviation of the blur, in pixels; of deblurring.
        method: "network", "latent-map" or "posterior".
        n_steps: iterations of latent-map, draws of posterior after as many of warm-up.
        is_clean: whether the picture is the truth, to be measured first, or the measurement itself.
    """

    problem: str = "denoising"
    sigma: float = 0.1
    width: float = 1.5
    method: str = "network"
    n_steps: int = 60
    is_clean: bool = True

    @property
    def parameters(self) -> dict[str, Any]:
        """Of the problem, without the mask."""
        blur = {"sigma_blur": self.width, "kernel_size": 2 * round(3 * self.width) + 1}
        blur |= {"boundary": "replicate"} if self.is_clean else {}
        return {"sigma": self.sigma} | (blur if self.problem == "deblurring" else {})

    @property
    def options(self) -> dict[str, Any]:
        """Of the method."""
        draws = {"n_warmup": self.n_steps, "n_samples": self.n_steps, "n_chains": 2}
        return {"network": {}, "latent-map": {"n_iterations": self.n_steps}, "posterior": draws}[self.method]

    @property
    def command(self) -> str:
        """The command line that does the same to picture.png and, for inpainting, mask.png."""
        network = "" if self.problem == "denoising" else "--method plug-and-play "
        how = f"{network}--model {NETWORK}" if self.method == "network" else f"--method {self.method} --flow {FLOW}"
        words = [
            "flowprox reconstruct",
            "--simulate" if self.is_clean else "--measured",
            f"--problem {self.problem}",
            how,
        ]
        mask = {"mask": "mask.png"} if self.problem == "inpainting" else {}
        for name, values in (("parameters", self.parameters | mask), ("options", self.options)):
            words += [f"--{name} " + " ".join(f"{key}={value}" for key, value in values.items())] if values else []
        return " ".join([*words, "--out restored -- picture.png"])

    def run(self, picture: Tensor, mask: np.ndarray | None, losses: list[float]) -> Restored:
        """Restore picture (3, H, W); mask (H, W) is 1 where it is kept; losses receives the objective of latent-map."""
        given: dict[str, Any] = {"mask": mask} if self.problem == "inpainting" else {}
        measurement = picture
        if self.is_clean:
            height, width = picture.shape[-2:]
            physics = make_physics(self.problem, (3, height, width), **self.parameters, **given)
            measurement = physics(picture[None], seed=0)[0]
        model: Any = NETWORK
        if self.method != "network":
            model = make_method(self.method, Problem(self.problem, {}), flow=load_model(FLOW), **self.options)
        if self.method == "latent-map":
            model.optimizer = _WatchedLBFGS(n_iterations=self.n_steps, losses=losses)
        truth = picture if self.is_clean else None
        return restore(measurement, self.problem, model, truth=truth, **given, **self.parameters)


def _read(drawn: Mapping[str, Any], longest: int) -> tuple[Tensor, np.ndarray]:
    """The picture (3, H, W), and the mask (H, W): 0 where something was painted over it."""
    background = drawn["background"].convert("RGB")
    painted = np.zeros((background.height, background.width), bool)
    for layer in drawn["layers"]:
        painted |= np.asarray(layer.convert("RGBA"))[..., 3] > 0
    size = [max(8, round(side * min(1, longest / max(background.size)))) for side in background.size]
    pixels = np.asarray(background.resize(size, Image.Resampling.LANCZOS))
    mask = Image.fromarray(painted.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    return torch.from_numpy(np.moveaxis(pixels, -1, 0).copy()) / 255, (np.asarray(mask) == 0).astype(np.float32)


def _pixels(x: Tensor) -> np.ndarray:
    return (x.clamp(0, 1).movedim(0, -1) * 255).round().to(torch.uint8).numpy()


def _shell(command: str) -> str:
    lines = command.replace(" --", " \\\n    --")
    return f"The same on the command line:\n```bash\n{lines}\n```"


def _answers(drawn: Mapping[str, Any] | None, *choices: Any) -> Iterator[tuple[Any, ...]]:
    """What the page shows: again and again the loss while a solver works, at the end the result."""
    import gradio as gr  # pyright: ignore[reportMissingImports]

    task = Request(*choices)
    if drawn is None or drawn.get("background") is None:
        raise gr.Error("give a picture first: a file, the clipboard or the webcam", print_exception=False)
    picture, mask = _read(drawn, SIDES[task.method])
    if task.problem == "inpainting" and mask.all():
        raise gr.Error("paint over what is to be filled in, with the brush on the left", print_exception=False)
    losses: list[float] = []

    def shown(value: object) -> Any:
        return gr.update(value=value, visible=value is not None)

    started, curve = time.perf_counter(), None
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(task.run, picture, mask, losses)
        while not job.done():
            wait([job], timeout=0.5)
            if losses:
                curve = pd.DataFrame({"evaluation": range(1, len(losses) + 1), "objective": losses})
            yield gr.skip(), shown(curve), shown(None), f"{time.perf_counter() - started:.0f} s", _shell(task.command)
        try:
            result = job.result()
        except (ArithmeticError, OSError, RuntimeError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error
    notes = [result.problem, f"{picture.shape[1]}x{picture.shape[2]} pixels", f"{time.perf_counter() - started:.1f} s"]
    notes += [f"**{result.psnr:.2f} dB**"] if result.psnr is not None else []
    notes += [result.reason] if result.reason else []
    deviation = None if result.deviation is None else _pixels(result.deviation / result.deviation.max())
    if deviation is not None:
        deviation = deviation.repeat(4, 0).repeat(4, 1)  # of 64 pixels
    pictures = _pixels(result.y), _pixels(result.x_hat)
    yield pictures, shown(curve), shown(deviation), "; ".join(notes), _shell(task.command)


def make_page() -> Any:
    """The page, a ``gradio.Blocks``; ``launch`` serves it. ImportError without gradio."""
    gr = require_package("gradio", "gradio", "flowprox app", extra="app")
    sample = Image.fromarray(_pixels(load_image(SAMPLES_FOLDER / "chelsea.png", channels=3)))
    with gr.Blocks(title="flowprox", analytics_enabled=False) as page, gr.Row():
        with gr.Column():
            gr.Markdown(
                "# flowprox\nA picture, what happened to it, and what is behind it. It stays on this machine.\n\n"
                "For inpainting paint over what is to be filled in."
            )
            picture = gr.ImageEditor(
                {"background": sample, "layers": [], "composite": sample},
                type="pil",
                sources=("upload", "webcam", "clipboard"),
                brush=gr.Brush(colors=["#ff2d55"], default_size=6),
                layers=False,
                label="picture",
            )
            choices = [
                gr.Radio(PROBLEMS, value="denoising", label="problem"),
                gr.Slider(0, 0.4, 0.1, step=0.01, label="noise: standard deviation, pixels in [0, 1]"),
                gr.Slider(0.5, 4, 1.5, step=0.1, label="deblurring: standard deviation of the blur, in pixels"),
                gr.Radio(list(SIDES), value="network", label="method"),
                gr.Slider(10, 400, 60, step=10, label="latent-map: iterations; posterior: draws"),
                gr.Checkbox(True, label="the picture is clean: degrade it first, and compare"),
            ]
            button = gr.Button("Restore", variant="primary")
        with gr.Column():
            answers = [
                gr.ImageSlider(label="before and after", interactive=False),
                gr.LinePlot(x="evaluation", y="objective", label="objective", height=200, visible=False),
                gr.Image(label="deviation", height=260, interactive=False, visible=False),
                gr.Markdown(),
                gr.Markdown(_shell(Request().command)),
            ]
        button.click(_answers, [picture, *choices], answers)
    return page


def serve(port: int, show: bool = False) -> None:
    """Serve the page on 127.0.0.1 until the process ends; OSError where the port is taken, ImportError without gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    page = make_page()
    from gradio.themes import Base  # pyright: ignore[reportMissingImports]

    local = Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none from elsewhere
    print(f"http://127.0.0.1:{port}, for this machine alone; Ctrl-C ends it", flush=True)
    page.launch(
        server_name="127.0.0.1", server_port=port, inbrowser=show, share=False, quiet=True, ssr_mode=False, theme=local
    )
