"""Methods applied to files of any size: clean images, which are measured first, and measurements."""

from flowprox.reconstruction.jobs import (
    ReconstructionInterrupted,
    ReconstructionJob,
    image_seed,
    reconstruct_files,
)
from flowprox.reconstruction.sizes import Fitted, WindowedBlur, fit_to_divisor

__all__ = [
    "Fitted",
    "ReconstructionInterrupted",
    "ReconstructionJob",
    "WindowedBlur",
    "fit_to_divisor",
    "image_seed",
    "reconstruct_files",
]
