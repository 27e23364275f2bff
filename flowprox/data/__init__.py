"""Images from folders and shards, measurements from files, and the order in which training sees them.

Images are float32 tensors (C, H, W) in [0, 1]. A data set is decoded once, into one uint8 tensor, so that training
never waits for files; an image that cannot be read stops it with the file's name, or is skipped and reported.
"""

from flowprox.data.datasets import IMAGE_SUFFIXES, ImageDataset, split_indices
from flowprox.data.files import (
    ARRAY_SUFFIXES,
    SCAN_SUFFIXES,
    PictureForm,
    Stack,
    load_array,
    load_image,
    load_measurement,
    load_stack,
    picture_form,
    save_image,
    suffix_of,
)

__all__ = [
    "ARRAY_SUFFIXES", "IMAGE_SUFFIXES", "SCAN_SUFFIXES", "ImageDataset", "PictureForm", "Stack", "load_array",
    "load_image", "load_measurement", "load_stack", "picture_form", "save_image", "split_indices", "suffix_of",
]  # fmt: skip
