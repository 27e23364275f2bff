"""The guide's Python runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import transforms

from flowprox.cli import completed, make_parser
from flowprox.commands.terminal import key_values
from flowprox.flows import Bijection, Flow
from flowprox.methods import METHODS, check_options
from flowprox.operators import PROBLEMS, Problem, make_physics
from flowprox.solvers import LBFGS, LatentMAP

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("docs/**/*.md"))
RUN = ["concepts.md", "extend.md", "reconstruct.md", "uncertainty.md"]


@pytest.fixture
def _entries() -> Iterator[None]:
    """What a page enters in a registry is taken out again."""
    problems, methods = dict(PROBLEMS), dict(METHODS)
    yield
    for registry, before in ((PROBLEMS, problems), (METHODS, methods)):
        for name in set(registry) - set(before):
            del registry[name]


@pytest.mark.usefixtures("_entries")
@pytest.mark.parametrize("name", RUN)
def test_the_pages_code_runs(name: str) -> None:
    text = (ROOT / "docs" / "guide" / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    space: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, name, "exec"), space)


class _LikeZuko(nn.Module):
    """What ``FromZuko`` needs of a flow of zuko, with a transform of torch."""

    def forward(self) -> SimpleNamespace:
        transform = transforms.AffineTransform(torch.linspace(-1, 1, 48), torch.linspace(1, 2, 48))
        return SimpleNamespace(transform=transforms.IndependentTransform(transform, 1))


class _LikeNormflows(nn.Module):
    """What ``FromNormflows`` needs of a flow of normflows."""

    def inverse_and_log_det(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * x + 1, torch.full((len(x),), 48 * math.log(2))

    def forward_and_log_det(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (z - 1) / 2, torch.full((len(z),), -48 * math.log(2))


def _of_zuko() -> nn.Module:
    return pytest.importorskip("zuko").flows.NSF(48, transforms=1, hidden_features=[8])


def _of_normflows() -> nn.Module:
    normflows = pytest.importorskip("normflows")
    net = normflows.nets.MLP([24, 8, 48], init_zeros=True)
    base = normflows.distributions.DiagGaussian(48, trainable=False)
    return normflows.NormalizingFlow(base, [normflows.flows.AffineCouplingBlock(net)])


OTHERS = {"FromZuko": (_LikeZuko, _of_zuko), "FromNormflows": (_LikeNormflows, _of_normflows)}


@pytest.mark.parametrize(("wrapper", "make"), [(name, make) for name, makes in OTHERS.items() for make in makes])
def test_flows_of_other_libraries_are_priors(wrapper: str, make: Callable[[], nn.Module]) -> None:
    text = (ROOT / "docs" / "guide" / "extend.md").read_text(encoding="utf-8")
    space: dict[str, Any] = {"Bijection": Bijection}
    for block in re.findall(r"```py\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "extend.md", "exec"), space)
    flow, x = Flow(space[wrapper](make()), (3, 4, 4)), torch.rand(2, 3, 4, 4)
    z, logdet = flow(x)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x[0]).reshape(48, 48)
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian)[1], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(flow.decode(z), x, atol=1e-4, rtol=0)
    physics = make_physics("denoising", (3, 4, 4), sigma=0.1)
    map_estimate = LatentMAP(flow, gamma=0.1, norm="squared", optimizer=LBFGS(n_iterations=2))
    assert map_estimate(x, physics).shape == x.shape


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    made = "examples/"  # by the site's gallery
    missing = [
        link for link in links if "://" not in link and not link.startswith(made) and not (page.parent / link).exists()
    ]
    assert missing == []


def test_what_the_table_of_jobs_says_are_commands_of_known_problems_and_methods() -> None:
    text = (ROOT / "docs" / "guide" / "reconstruct.md").read_text(encoding="utf-8")
    lines = [
        cell for row in re.findall(r"^\| .*", text, re.MULTILINE) for cell in re.findall(r"`(--m[^`]*--[^`]*)`", row)
    ]
    parser, seen = make_parser(), set()
    for line in lines:
        words = [*shlex.split(line.replace("NAME", "unfolded-denoising-faces64")), "--out", "clean", "--", "photo.jpg"]
        options = parser.instantiate(parser.parse_args(completed(["reconstruct", *words])))["reconstruct"]
        if options.method:
            check_options(options.method, key_values(options.options, "options"))
        if options.problem:
            Problem(options.problem, key_values(options.parameters, "parameters"))
            seen.add(options.problem)
    assert {"inpainting", "deblurring", "super-resolution", "mri", "multicoil-mri", "ct", "compressed-sensing"} <= seen


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
