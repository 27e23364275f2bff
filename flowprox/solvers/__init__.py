"""Reconstruction with a flow that was trained on clean images only: no training for the operator.

Every solver is called like every other method, ``x_hat = solver(y, physics)``; ``solver.solve(y, physics)`` gives a
``Solution`` with estimate, latent, loss curve and the reason of stopping.
"""

from flowprox.solvers.importance import Proposal, WeightedSamples, importance_samples
from flowprox.solvers.latent_map import Discrepancy, LatentMAP
from flowprox.solvers.noise_map import GANPrior, NoiseMAP
from flowprox.solvers.optimizers import LBFGS, OPTIMIZERS, Adam, TorchLBFGS
from flowprox.solvers.posterior import PosteriorSampling, PosteriorSolution, SamplerOptions
from flowprox.solvers.problem import Solution, SolverInterrupted, null_space_perturbed

__all__ = [
    "LBFGS", "Adam", "Discrepancy", "GANPrior", "LatentMAP", "NoiseMAP", "OPTIMIZERS", "PosteriorSampling",
    "PosteriorSolution", "SamplerOptions", "Proposal", "Solution", "SolverInterrupted", "TorchLBFGS", "WeightedSamples",
    "importance_samples", "null_space_perturbed",
]  # fmt: skip
