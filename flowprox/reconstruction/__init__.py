"""Methods applied to files of any size: clean images, which are measured first, and measurements."""

from flowprox.evaluation.plan import image_seed
from flowprox.reconstruction.jobs import ReconstructionInterrupted, ReconstructionJob, reconstruct_files

__all__ = ["ReconstructionInterrupted", "ReconstructionJob", "image_seed", "reconstruct_files"]
