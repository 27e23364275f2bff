"""Forward operators: a problem's name becomes a deepinv ``Physics`` with its noise.

    y = A x + sigma n,    n ~ N(0, I)

x image in [0, 1], shape (B, C, H, W); y measurement; A linear operator, A^T its adjoint; sigma noise standard deviation
in the units of x. Two functions reach the data from an image estimate, and every unfolded network and solver uses them:
``data_gradient`` and ``data_prox``.

All operators keep the size of the image. Denoising and deblurring take images of any size, whatever size they were made
for; a mask belongs to one size.
"""

from flowprox.operators.blur import CircularBlur, CircularConvolution, LearnedBlur
from flowprox.operators.data_steps import data_gradient, data_prox
from flowprox.operators.kinds import BOUNDARIES, PROBLEMS, ProblemKind
from flowprox.operators.masks import centre_mask, random_mask
from flowprox.operators.measuring import measure, measure_each
from flowprox.operators.noise import SeededGaussianNoise
from flowprox.operators.problems import Problem, make_physics

__all__ = [
    "BOUNDARIES",
    "CircularBlur",
    "CircularConvolution",
    "LearnedBlur",
    "PROBLEMS",
    "Problem",
    "ProblemKind",
    "SeededGaussianNoise",
    "centre_mask",
    "data_gradient",
    "data_prox",
    "make_physics",
    "measure",
    "measure_each",
    "random_mask",
]
