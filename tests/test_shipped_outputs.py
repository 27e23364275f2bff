"""Every shipped model loads and gives what it gave when its outputs were stored in ``shipped_outputs.json``.

Bit for bit on the kind of CPU and the torch version that stored them: convolutions sum in another order elsewhere, and then
1e-5 of the output's scale is what float32 promises. ``python tests/test_shipped_outputs.py NAME ...`` stores those of
models anew; that is right only when their weights are new.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowprox.checkpoints import list_models, load_card, load_model
from flowprox.flows import Flow
from flowprox.noise import FlowNoise
from flowprox.operators import Problem, make_physics
from flowprox.uncertainty import Intervals

STORED = Path(__file__).with_name("shipped_outputs.json")
SIZE = 64
TOLERANCE = 1e-5


def machine() -> list[str]:
    """What decides the order in which sums are taken."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    cpu = {line.split(":")[1].strip() for line in text.splitlines() if line.startswith(("model name", "model\t"))}
    return [*sorted(cpu), torch.backends.cpu.get_cpu_capability(), torch.__version__]


def image(channels: int = 3) -> Tensor:
    """(2, C, 64, 64) in [0, 1]: slopes and an integer hash, the same on every machine and with every version of torch."""
    n = torch.arange(2 * channels * SIZE * SIZE, dtype=torch.int64)
    hashed = (n * 2654435761 + 12345) % 2**32 // 2**16 % 256
    slopes = (n % SIZE + n // SIZE % SIZE) * 255 // (2 * SIZE)
    return ((3 * slopes + hashed).to(torch.float32) / 1024).view(2, channels, SIZE, SIZE)


@torch.no_grad()
def outputs(name: str) -> dict[str, Tensor]:
    """The latent and log-density of a flow, the reconstruction of a network, the half-widths of intervals."""
    model = load_model(name)
    flow = model.flow if isinstance(model, FlowNoise) else model
    if isinstance(flow, Flow):
        x = image(flow.n_channels) - (0.5 if isinstance(model, FlowNoise) else 0.0)
        return {"encode": flow.encode(x), "log_prob": model.log_prob(x)}
    if isinstance(model, Intervals):
        problem = model.card.problem
        physics = make_physics(Problem(problem["name"], problem["parameters"]), (3, SIZE, SIZE))
        return {"half_widths": model(image(), physics.A(image()), physics)}
    parameters, channels = model.card.problem["parameters"], model.card.preprocessing["channels"] or 3
    level = {} if "photons" in parameters else {"sigma": 0.05}
    physics = make_physics(model.card.problem["name"], (channels, SIZE, SIZE), **{**parameters, **level})
    return {"reconstruction": model(physics.A(image(channels)), physics)}


def record(tensor: Tensor) -> dict[str, Any]:
    assert tensor.dtype == torch.float32
    flat = tensor.contiguous().flatten()
    return {
        "sha256": hashlib.sha256(flat.numpy().tobytes()).hexdigest(),
        "values": flat[:: max(1, len(flat) // 16)].tolist(),
        "sum": flat.double().sum().item(),
        "sum_of_magnitudes": flat.double().abs().sum().item(),
    }


def test_outputs_of_every_shipped_model_are_stored() -> None:
    assert list(json.loads(STORED.read_text(encoding="utf-8"))) == list_models()


@pytest.mark.parametrize("name", [name for name in list_models() if name.endswith("-intervals")])
def test_intervals_are_of_the_network_that_ships(name: str) -> None:
    network, problem = load_card(name.removesuffix("-intervals")), load_card(name).problem
    assert problem is not None
    load_model(name).check(network.sha256, Problem(problem["name"], problem["parameters"]))


@pytest.mark.parametrize("name", list_models())
def test_output_is_the_stored_one(name: str) -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        computed = {key: record(tensor) for key, tensor in outputs(name).items()}
    finally:
        torch.set_num_threads(threads)
    if stored["machine"] == machine():
        assert computed == stored["outputs"]
    assert computed.keys() == stored["outputs"].keys()
    for key, expected in stored["outputs"].items():
        values, wanted = torch.tensor(computed[key]["values"]), torch.tensor(expected["values"])
        assert (values - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
        assert abs(computed[key]["sum"] - expected["sum"]) <= TOLERANCE * expected["sum_of_magnitudes"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    models = json.loads(STORED.read_text(encoding="utf-8"))
    for name in sys.argv[1:]:
        computed = {key: record(tensor) for key, tensor in outputs(name).items()}
        models[name] = {"machine": machine(), "outputs": computed}
    models = {name: models[name] for name in list_models()}
    STORED.write_text(json.dumps(models, indent=1) + "\n", encoding="utf-8")
