"""Images from folders and shards, measurements from files, and the order in which training sees them.

Images are float32 tensors (C, H, W) in [0, 1]. A data set is decoded once, into one uint8 tensor, so that training
never waits for files; an image that cannot be read stops it with the file's name, or is skipped and reported.
"""

from flowprox.data.datasets import ImageDataset
from flowprox.data.images import check_image, load_image, save_image
from flowprox.data.measurements import load_array, load_measurement
from flowprox.data.sampler import ResumableSampler
from flowprox.data.sources import IMAGE_SUFFIXES, split_indices

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageDataset",
    "ResumableSampler",
    "check_image",
    "load_array",
    "load_image",
    "load_measurement",
    "save_image",
    "split_indices",
]
