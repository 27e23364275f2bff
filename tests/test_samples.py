import runpy
from pathlib import Path

import torch

from flowprox.data import load_image
from flowprox.samples import PORTRAITS, SAMPLES_FOLDER, sample_images


def test_pictures():
    pictures = dict(sample_images())
    assert set(PORTRAITS) < set(pictures)
    for x in pictures.values():
        assert x.dtype == torch.float32 and x.shape[0] == 3
        assert all(side % 16 == 0 for side in x.shape[1:])
        assert 0 <= x.min() and x.max() <= 1 and x.std() > 0.1


def test_every_picture_has_its_source():
    sources = (SAMPLES_FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in sources for path in SAMPLES_FOLDER.glob("*.png"))


def test_the_script_makes_the_bundled_pictures_again(tmp_path):
    bundled = dict(sample_images())
    runpy.run_path(str(Path(__file__).parents[1] / "tools" / "make_samples.py"))["make_samples"](tmp_path)
    for path in tmp_path.glob("*.png"):
        # a few gray levels of room for other versions of the JPEG decoder
        assert (load_image(path) - bundled[path.stem]).abs().max() < 4 / 255
