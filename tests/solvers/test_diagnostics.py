"""Diagnostics against chains whose autocorrelation time is known."""

from __future__ import annotations

import pytest
import torch
from arviz_stats.base import array_stats
from torch import Tensor

from flowprox.solvers.diagnostics import effective_sample_size, split_r_hat

N_CHAINS, N_DRAWS = 4, 8_000


def autoregressive(rho: float, n_chains: int = N_CHAINS, n_draws: int = N_DRAWS) -> Tensor:
    """x_t = rho x_(t-1) + sqrt(1 - rho^2) n_t, stationary from the start: tau = (1 + rho) / (1 - rho)."""
    noise = torch.randn(n_draws, n_chains, dtype=torch.float64)
    draws = [noise[0]]
    for n in noise[1:]:
        draws.append(rho * draws[-1] + (1 - rho**2) ** 0.5 * n)
    return torch.stack(draws, dim=-1)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.7, 0.95, -0.5])
def test_effective_sample_size_of_an_autoregressive_chain(rho: float) -> None:
    draws = autoregressive(rho)
    expected = N_CHAINS * N_DRAWS * (1 - rho) / (1 + rho)
    assert effective_sample_size(draws).item() == pytest.approx(expected, rel=0.1)
    assert split_r_hat(draws).item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("n_draws", [5, 6, 99, 500])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.95, -0.5])
def test_both_agree_with_arviz(rho: float, n_draws: int) -> None:
    draws = autoregressive(rho, n_draws=n_draws)
    axes = {"chain_axis": 0, "draw_axis": 1}
    expected = float(array_stats.ess(draws.numpy(), method="bulk", **axes))
    assert effective_sample_size(draws).item() == pytest.approx(expected, rel=1e-10)
    assert split_r_hat(draws).item() == pytest.approx(
        float(array_stats.rhat(draws.numpy(), method="rank", **axes)), rel=1e-12
    )


def test_effective_sample_size_predicts_the_error_of_the_mean() -> None:
    draws = autoregressive(0.8, n_chains=400, n_draws=1000)  # 100 runs of four chains
    runs = draws.view(100, 4, 1000)
    predicted = effective_sample_size(runs).mean()
    observed = 1 / runs.mean((1, 2)).square().mean()
    assert observed.item() == pytest.approx(predicted.item(), rel=0.45)  # 3 sd of a variance from 100 values


def changes_of(draws: Tensor) -> dict[str, Tensor]:
    drift = torch.linspace(-1, 1, draws.shape[-1], dtype=draws.dtype)
    return {
        "one chain elsewhere": draws + torch.tensor([0.0, 0, 0, 1.5])[:, None],
        "one chain wider": draws * torch.tensor([1.0, 1, 1, 4])[:, None],
        "a common drift": draws + 2 * drift,
    }


@pytest.mark.parametrize("name", changes_of(torch.zeros(4, 2)))
def test_r_hat_sees(name: str) -> None:
    draws = torch.randn(4, 1000, dtype=torch.float64)
    assert split_r_hat(draws) < 1.01
    assert split_r_hat(changes_of(draws)[name]) > 1.1


def test_both_depend_on_ranks_only() -> None:
    draws = autoregressive(0.5, n_draws=1000)
    for measure in (split_r_hat, effective_sample_size):
        found = measure(draws.exp()) if measure is effective_sample_size else measure(3 * draws + 1)
        torch.testing.assert_close(found, measure(draws))


def test_heavy_tails_do_not_hide_another_place() -> None:
    draws = torch.distributions.Cauchy(0.0, 1.0).sample((4, 1000))
    assert split_r_hat(draws) < 1.02
    draws[3] += 5
    assert split_r_hat(draws) > 1.1


def test_batches_are_scalars_side_by_side() -> None:
    draws = torch.stack([autoregressive(0.5, n_draws=200), torch.randn(4, 200, dtype=torch.float64)])
    for measure in (split_r_hat, effective_sample_size):
        torch.testing.assert_close(measure(draws), torch.stack([measure(d) for d in draws]))


def test_repeated_draws_count_once() -> None:
    """What a rejection leaves: each value r times has the effective size of the values."""
    draws = torch.randn(4, 2000, dtype=torch.float64).repeat_interleave(5, dim=-1)
    assert effective_sample_size(draws).item() == pytest.approx(8_000, rel=0.1)


@pytest.mark.parametrize("draws", [torch.zeros(2, 10), torch.full((2, 10), float("nan")), torch.eye(4, 10) / 0])
def test_what_cannot_be_judged_is_nan(draws: Tensor) -> None:
    assert split_r_hat(draws).isnan() and effective_sample_size(draws).isnan()


@pytest.mark.parametrize("shape", [(4, 3), (10,), (0, 10)])
def test_too_few_draws(shape: tuple[int, ...]) -> None:
    for measure in (split_r_hat, effective_sample_size):
        with pytest.raises(ValueError, match="at least 4 draws"):
            measure(torch.zeros(shape))
