"""Forward operators: a problem's name becomes a deepinv ``Physics`` with its noise.

    y = A(x) + n

x image in [0, 1], shape (B, C, H, W); y measurement (B, ...); A operator, linear with adjoint A^T in all problems but
one-bit sensing; n noise, white and Gaussian with standard deviation sigma unless another is named. Two functions reach the
data from an image estimate, and every unfolded network and solver uses them: ``data_gradient`` and ``data_prox``.

Denoising, inpainting and deblurring keep the size of the image; a sensing matrix gives (B, m), super-resolution an image
factor times smaller, MRI (B, 2 C, H, W) or (B, 2, N, H, W) by N coils, tomography (B, C, N, n_angles). Denoising and
deblurring take images of any size, whatever size they were made for; the other operators belong to one size.
"""

from flowprox.operators.blur import BOUNDARIES, CircularBlur, CircularConvolution, LearnedBlur, PaddedBlur, WindowedBlur
from flowprox.operators.imaging import (
    CT,
    FILTERS,
    CoilMRI,
    RealMRI,
    SuperResolution,
    coil_sensitivities,
    filtered_backprojection,
    kspace_mask,
)
from flowprox.operators.kinds import PROBLEMS, Parameter, ProblemKind
from flowprox.operators.masks import center_mask, random_mask
from flowprox.operators.measurements import (
    ExactProx,
    check_adjoint,
    check_measurement,
    data_gradient,
    data_prox,
    measure,
    measure_each,
    measured_entries,
    measurement_shape,
    visibility,
)
from flowprox.operators.problems import Problem, VariedProblem, make_physics
from flowprox.operators.sensing import DenseSensing, OneBitSensing, StructuredSensing
from flowprox.operators.sizes import Fitted, fit_to_divisor, measured_part, mirrored

__all__ = [
    "BOUNDARIES", "CT", "CircularBlur", "CircularConvolution", "DenseSensing", "CoilMRI", "LearnedBlur", "ExactProx",
    "FILTERS", "Fitted", "OneBitSensing", "PROBLEMS", "PaddedBlur", "Parameter", "Problem", "ProblemKind", "RealMRI",
    "StructuredSensing", "SuperResolution", "VariedProblem", "WindowedBlur", "coil_sensitivities",
    "filtered_backprojection", "kspace_mask", "center_mask", "check_adjoint", "check_measurement", "data_gradient",
    "data_prox", "fit_to_divisor", "make_physics", "measure", "measure_each", "measured_entries", "measured_part",
    "measurement_shape", "mirrored", "random_mask", "visibility",
]  # fmt: skip
