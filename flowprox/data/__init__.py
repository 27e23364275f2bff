"""Images from folders and shards, measurements from files, and the order in which training sees them.

Images are float32 tensors (C, H, W) in [0, 1]. A data set is decoded once, into one uint8 tensor, so that training
never waits for files; an image that cannot be read stops it with the file's name, or is skipped and reported.
"""

from flowprox.data.datasets import IMAGE_SUFFIXES, ImageDataset, split_indices
from flowprox.data.files import PictureForm, load_array, load_image, load_measurement, picture_form, save_image
from flowprox.data.sampler import ResumableSampler

__all__ = [
    "IMAGE_SUFFIXES",
    "ImageDataset",
    "PictureForm",
    "ResumableSampler",
    "load_array",
    "load_image",
    "load_measurement",
    "picture_form",
    "save_image",
    "split_indices",
]
