"""The commands that show what there is: the demo, models and samples of them, problems, methods, recipes."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowprox.commands.terminal import check_device, check_models, find_recipe, key_values, list_recipes, print_table
from flowprox.naming import digits, nearest, require_count, require_package

if TYPE_CHECKING:
    from flowprox.checkpoints import Card


def demo(out: str = "flowprox-demo", device: str = "cpu", seed: int = 0, overwrite: bool = False) -> None:
    """Reconstruct the bundled pictures for three problems and write a report. Needs no download.

    Arguments:
        out: folder to write; report.html in it shows the result.
        device: cpu, cuda or mps.
        seed: of the noise.
        overwrite: replace the folder if an earlier demo is in it.
    """
    check_device(device)
    from flowprox.demo import run_demo
    from flowprox.naming import require_device

    require_device(device)
    print(f"report: {run_demo(out, device=device, seed=seed, overwrite=overwrite)}")


def app(port: int = 7860, show: bool = True) -> None:
    """Open a page to try the methods on a picture or the webcam. It answers this machine only and sends nothing.

    Arguments:
        port: of this machine, 127.0.0.1.
        show: open the page in the browser; --no-show only prints its address.
    """
    if not 0 < port < 65536:
        raise ValueError(f"port must lie between 1 and 65535, got {port}")
    from flowprox.app import serve

    serve(port, show)


def sample(
    model: str,
    out: str = "samples.png",
    n: int = 16,
    temperature: float = 0.7,
    seed: int = 0,
    size: int | None = None,
    device: str = "cpu",
) -> None:
    """Draw images or noise from a trained flow, or from the flow of each fold of an unfolded network, as one picture.

    Noise is stretched so that its lowest value is black and its highest white. Each fold has a row of its own.

    Arguments:
        model: a shipped model (see "flowprox models"), a folder, or hf:ORG/NAME.
        out: PNG file to write.
        n: how many images.
        temperature: standard deviation of the latent; below 1 images are smoother.
        seed: the same seed draws the same images.
        size: height and width in pixels; by default those the flow was made for.
        device: cpu, cuda or mps.
    """
    require_count("n", n)
    if not out.lower().endswith(".png"):
        raise ValueError(f"out must end in .png, got {out!r}")
    check_device(device)
    check_models(model)
    import torch
    from torchvision.utils import make_grid

    from flowprox.checkpoints import load_model
    from flowprox.data import save_image
    from flowprox.flows import Flow
    from flowprox.noise import FlowNoise
    from flowprox.unfolding import Unfolded

    loaded = load_model(model, device=device)
    flow = loaded.flow if isinstance(loaded, FlowNoise) else loaded
    if not isinstance(flow, Flow | Unfolded):
        raise ValueError(f"model {model!r} is a {type(flow).__name__}, not a flow; see flowprox models")
    generator = torch.Generator(device).manual_seed(seed)
    x = flow.sample(n, temperature, None if size is None else (size, size), generator)
    if isinstance(loaded, FlowNoise):
        x = (x - x.amin()) / (x.amax() - x.amin())
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    columns = n if isinstance(flow, Unfolded) else math.ceil(math.sqrt(n))
    save_image(make_grid(x.clamp(0, 1).cpu(), nrow=columns, padding=2, pad_value=1.0), out)
    print(f"written to {out}")


def export(
    model: str,
    out: str = "model.pt2",
    size: list[int] | None = None,
    parameters: list[str] | None = None,
    inputs: list[str] | None = None,
) -> None:
    """Write a trained network as one program for one operator, which runs without flowprox.

    Arguments:
        model: a shipped model (see "flowprox models"), a folder, or hf:ORG/NAME.
        out: file to write: .pt2 for torch.export, .onnx for onnxruntime and browsers (needs the package onnxscript).
        size: height and width in pixels, which are then fixed; by default those the network was made for.
        parameters: KEY=VALUE ... of the problem it was trained for, where they differ from its card.
        inputs: what of the operator the program takes after y, in place of a constant: sigma, mask.
    """
    if not out.endswith((".pt2", ".onnx")):
        raise ValueError(f"out must end in .pt2 or .onnx, got {out!r}")
    if size is not None and len(size) != 2:
        raise ValueError(f"size must be two numbers, height and width; got {size}")
    other = key_values(parameters, "parameters")
    check_models(model)
    import torch

    from flowprox.checkpoints import load_model
    from flowprox.estimates import problem_of
    from flowprox.files import atomic_write
    from flowprox.operators import make_physics
    from flowprox.unfolding import export_program

    network = load_model(model)
    trained, shape = network.card.problem, network.card.preprocessing.get("image_shape")
    if not trained or not shape:
        raise ValueError(f"model {model} was trained for no problem; only unfolded networks can be exported")
    problem = problem_of(trained, None, other, model)
    height, width = size or shape[1:]
    shape = (shape[0], height, width)
    physics = make_physics(problem, shape, seed=trained.get("seed", 0))
    with torch.random.fork_rng(devices=[]):
        program = export_program(network, physics, physics(torch.rand(2, *shape)), inputs or ())
    with atomic_write(out) as file:
        if out.endswith(".pt2"):
            warnings.filterwarnings("ignore", "No complete tensor found")  # of buffers that are views of one storage
            torch.export.save(program, file)
        else:
            file.write(_onnx(program, ["y", *(inputs or ())]))
    print(f"written to {out}: y of shape (B, {', '.join(map(str, shape))}) for {problem.label}")


def _onnx(program: Any, names: list[str]) -> bytes:
    """The program as one file for onnxruntime, weights inside."""
    import torch

    optimizer = require_package("onnxscript.optimizer", "onnxscript", "export to .onnx", extra="onnx")
    exported = torch.onnx.export(program, input_names=names, dynamo=True, verbose=False)
    assert exported is not None
    large = 2**20  # entries: maps of whole numbers are folded too, for which a browser has no kernels
    return optimizer.optimize(exported.model_proto, input_size_limit=large, output_size_limit=large).SerializeToString()


def push(model: str, repository: str, private: bool = True, revision: str | None = None) -> None:
    """Upload a trained model to the Hugging Face hub, where hf:ORG/NAME then names it. Log in first with: hf auth login.

    Arguments:
        model: a folder, a training run's folder, or a shipped model (see "flowprox models").
        repository: ORG/NAME; created if needed.
        private: whether a repository that is created is private; --no-private makes it public.
        revision: branch to commit to; by default the main one.
    """
    from flowprox.checkpoints import find_model, push_to_hub

    print(f"uploaded: {push_to_hub(find_model(model), repository, private, revision=revision)}")


def models(name: str | None = None) -> None:
    """List the models that have names, shipped ones and yours (FLOWPROX_MODELS), and their use, or print the card of one.

    Arguments:
        name: a shipped model, a folder, or hf:ORG/NAME whose card to print.
    """
    from flowprox.checkpoints import list_models, load_card

    if name is not None:
        print(load_card(name).to_json(), end="")
        return
    cards = {name: load_card(name) for name in list_models()}
    if not cards:
        print("no models are shipped with this installation")
        return
    intervals = [name for name, card in cards.items() if card.model["kind"] == "Intervals"]
    rows = [
        [name, _purpose(card), _terms(card).partition(":")[0], f"{card.n_bytes / 1e6:.1f}"]
        for name, card in cards.items()
        if name not in intervals
    ]
    print_table(["model", "use it for", "trained on", "MB"], rows, justify="left")
    for name in intervals:
        print(f"error bars: --intervals {name}")
    for license in sorted({card.license for card in cards.values()}):
        print(f"license of the weights: {license}")
    print("\n".join(sorted({f"  {_terms(card)}" for card in cards.values() if ":" in _terms(card)})))


def _purpose(card: Card) -> str:
    """What to give the model to, with what it was trained for."""
    if card.problem is None:
        return "noise: --noise NAME" if card.model["kind"] == "FlowNoise" else "prior: --flow NAME"
    settings = [f"{key} {value}" for key, value in card.problem.get("parameters", {}).items() if value is not None]
    settings += [f"{key} {low:g} to {high:g}" for key, (low, high) in card.problem.get("ranges", {}).items()]
    choice = f" ({card.notes['choice']})" if "choice" in card.notes else ""
    return ", ".join([str(card.problem.get("name")), *settings]) + choice


def _terms(card: Card) -> str:
    """Of the training data, as "name: terms"."""
    return str(card.training.get("terms") or "drawn noise").replace(" (LeCun, Cortes, Burges)", "")


def problems(name: str | None = None) -> None:
    """List the measurement problems, or the parameters of one with their meaning, default and unit.

    Arguments:
        name: the problem.
    """
    from flowprox.operators import PROBLEMS

    if name is None:
        return _list_all("problem", "what is measured", "parameters", PROBLEMS)
    kind = _one_of("problem", PROBLEMS, name)
    rows = [[key, _word(one.default), one.unit, one.meaning] for key, one in kind.parameters.items()]
    rows += [
        ["noise", "null", "", "another noise, by name: gaussian, sinusoidal, radial"],
        ["noise_parameters", "null", "", "of that noise"],
    ]
    print_table(["parameter", "default", "unit", "meaning"], rows, "left")
    value = "a VALUE is a number, true, false, null, [list] or text"
    print(f"as in --problem {name} --parameters {rows[0][0]}=VALUE; {value}")


def _list_all(what: str, about: str, of_it: str, known: Mapping[str, Any]) -> None:
    print_table([what, about], [[key, kind.description] for key, kind in known.items()], "left")
    print(f"flowprox {what}s NAME lists the {of_it} of one")


def _one_of(what: str, known: Mapping[str, Any], name: str) -> Any:
    """The entry of that name, whose description is printed."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; {nearest(name, known)}")
    print(f"{name}: {known[name].description}")
    return known[name]


def _word(value: object) -> str:
    """A default as it is written after KEY=."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return digits(value, 4).rstrip("0") if isinstance(value, float) and 1e-3 < value < 1 else str(value)


def recipes(name: str | None = None) -> None:
    """List the recipes of the package, or print one; --config takes their names.

    Arguments:
        name: the recipe.
    """
    if name is not None:
        print(find_recipe(name).read_text(encoding="utf-8"), end="")
        return
    rows = []
    for known in list_recipes():
        comment = re.split(r"\n(?!#)", find_recipe(known).read_text(encoding="utf-8"))[0]
        sentences = re.split(r"(?<=\.)(?<!Sec\.)(?<!App\.) (?=[A-Z])", " ".join(comment.replace("#", "").split()))
        rows.append([known, sentences[0]])
    print_table(["recipe", "what for"], rows, "left")


def methods(name: str | None = None) -> None:
    """List the reconstruction methods, or the options of one with their meaning and default.

    Arguments:
        name: the method.
    """
    from flowprox.methods import METHODS, method_options

    if name is None:
        return _list_all("method", "what it is", "options", METHODS)
    kind = _one_of("method", METHODS, name)
    print(f"for {', '.join(kind.applicable)}")
    if kind.parts:
        used = (f"--{part}" + ("" if needed else " (if given)") for part, needed in kind.parts.items())
        print(f"uses {', '.join(used)}")
    rows = [[key, _word(option.default), option.meaning] for key, option in method_options(name).items()]
    if not rows:
        return
    print_table(["option", "default", "meaning"], rows, "left")
    for problem, defaults in kind.defaults.items():
        print(f"for {problem} by default {', '.join(f'{key}={_word(value)}' for key, value in defaults.items())}")
