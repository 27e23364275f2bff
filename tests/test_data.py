"""Images from folders and shards, single files, measurements, splits, and the order of training."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms
from torch.utils.data import DataLoader

from flowprox.data import (
    ImageDataset,
    PictureForm,
    load_image,
    load_measurement,
    picture_form,
    save_image,
    split_indices,
)
from flowprox.training.images import ResumableSampler


def _pixels(height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _joined(lists: Iterable[list[Any]]) -> list[Any]:
    return [item for one in lists for item in one]


def _folder(path: Path, n: int = 4, **kwargs: int) -> Path:
    (path / "deeper").mkdir(parents=True)
    for i in range(n):
        Image.fromarray(_pixels(seed=i, **kwargs)).save(path / ("deeper" if i % 2 else "") / f"{i:03}.png")
    return path


def _shard(path: Path, n: int = 4, damaged: tuple[int, ...] = ()) -> Path:
    contents = []
    for i in range(n):
        file = io.BytesIO()
        Image.fromarray(_pixels(seed=i)).save(file, format="WEBP", lossless=True)
        contents.append(b"damaged" if i in damaged else file.getvalue())
    offsets = np.cumsum([0, *(len(c) for c in contents)])
    np.savez(path, webp=np.frombuffer(b"".join(contents), np.uint8), offsets=offsets)
    return path


# Data sets -----------------------------------------------------------------------------------------------------------


def test_folder_is_searched_recursively_in_the_order_of_names(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "images")
    (folder / "notes.txt").write_text("not an image")
    dataset = ImageDataset(folder, image_size=8)
    assert [os.path.relpath(name, folder) for name in dataset.names] == [
        "000.png", "002.png", "deeper/001.png", "deeper/003.png",
    ]  # fmt: skip
    item = dataset[2]
    assert set(item) == {"x"}
    assert item["x"].dtype == torch.float32
    expected = torch.from_numpy(_pixels(seed=1)).permute(2, 0, 1) / 255
    assert torch.equal(item["x"], expected)


def test_shard_glob_and_list_give_the_same_images(tmp_path: Path) -> None:
    shards = [_shard(tmp_path / f"train-{i}.npz") for i in range(2)]
    expected = torch.stack([torch.from_numpy(_pixels(seed=i)).permute(2, 0, 1) for i in [0, 1, 2, 3] * 2])
    for source in (str(tmp_path / "train-*.npz"), shards, [str(shard) for shard in shards], tmp_path):
        dataset = ImageDataset(source, image_size=8)
        assert torch.equal(dataset.images, expected)
    assert dataset.names[5] == f"{shards[1]}[1]"
    assert len(ImageDataset(shards, image_size=8, limit=3)) == 3


def test_loader_makes_batches(tmp_path: Path) -> None:
    dataset = ImageDataset(_folder(tmp_path / "a"), image_size=8)
    (batch,) = DataLoader(dataset, batch_sampler=ResumableSampler(4, 4))
    assert torch.equal(batch["x"], dataset.images[ResumableSampler(4, 4).order(0)] / 255)


def test_crop_and_lanczos(tmp_path: Path) -> None:
    pixels = _pixels(8, 16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = Image.fromarray(pixels[:, 4:12]).resize((4, 4), Image.Resampling.LANCZOS)
    x = ImageDataset(tmp_path, image_size=4)[0]["x"]
    assert torch.equal(x, torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255)


def test_patches_are_squares_of_the_image_at_its_own_resolution(tmp_path: Path) -> None:
    across, down = np.meshgrid(np.arange(40, dtype=np.uint8), np.arange(30, dtype=np.uint8))
    for name in ("a", "b", "c"):
        Image.fromarray(np.stack([across, down, 0 * down], -1)).save(tmp_path / f"{name}.png")
    dataset = ImageDataset(tmp_path, 16, patches=50)
    assert dataset.images.shape == (150, 3, 16, 16) and len(dataset.names) == 150
    steps = torch.arange(16, dtype=torch.uint8)
    lefts, tops = dataset.images[:, 0, 0, 0], dataset.images[:, 1, 0, 0]
    assert torch.equal(dataset.images[:, 0], (lefts[:, None, None] + steps).expand(150, 16, 16))
    assert torch.equal(dataset.images[:, 1], (tops[:, None, None] + steps[:, None]).expand(150, 16, 16))
    assert set(lefts.tolist()) == set(range(25)) and set(tops.tolist()) == set(range(15))
    assert not torch.equal(lefts[:50], lefts[50:100])


def test_few_patches_come_evenly_from_all_images(tmp_path: Path) -> None:
    for i in range(4):
        Image.fromarray(np.full((20, 20, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    dataset = ImageDataset(tmp_path, 16, patches=50, limit=7)
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert len(dataset.names) == 7


def test_patches_larger_than_the_image_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 12, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is 20x12, too small for patches of 16x16"):
        ImageDataset(tmp_path, 16, patches=2)


def test_native_size_must_be_the_same_for_all(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", height=6, width=9)
    assert ImageDataset(folder, image_size=None).images.shape == (4, 3, 6, 9)
    Image.fromarray(_pixels(5, 9)).save(folder / "z.png")
    with pytest.raises(ValueError, match=r"z\.png is 5x9 but .*000\.png is 6x9; give an image_size"):
        ImageDataset(folder, image_size=None)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    image.save(tmp_path / "a.png", exif=exif)
    x = load_image(tmp_path / "a.png")
    assert x.shape == (3, 16, 8)
    assert x[:, :8].min() == 1
    assert x[:, 8:].max() == 0


def _swapped_profile() -> bytes:
    """sRGB with red and blue exchanged."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (n,) = struct.unpack(">I", icc[128:132])
    at = {icc[132 + 12 * i : 136 + 12 * i].decode(): 136 + 12 * i for i in range(n)}
    red, blue = (slice(at[name], at[name] + 8) for name in ("rXYZ", "bXYZ"))
    icc[red], icc[blue] = icc[blue], icc[red]
    return bytes(icc)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colors_of_another_profile_become_srgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (4, 4), (200, 60, 40)).convert(mode)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "srgb.png", icc_profile=own)
    assert (load_image(tmp_path / "srgb.png") * 255)[:, 0, 0].round().tolist() == [200, 60, 40]
    image.save(tmp_path / "swapped.png", icc_profile=_swapped_profile())
    for x in (load_image(tmp_path / "swapped.png"), ImageDataset(tmp_path / "swapped.png", 4)[0]["x"]):
        np.testing.assert_allclose(x[:, 0, 0] * 255, [40, 60, 200], atol=2)
    image.save(tmp_path / "damaged.png", icc_profile=b"no profile")
    with pytest.warns(UserWarning, match=r"damaged\.png: its color profile is of no use"):
        assert load_image(tmp_path / "damaged.png").shape == (3, 4, 4)


def test_pages_beyond_the_first_are_spoken_of(tmp_path: Path) -> None:
    pages = [Image.new("L", (20, 10), value) for value in (10, 100, 200)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match=r"stack\.tif holds 3 pages, of which the first is read"):
        x = load_image(tmp_path / "stack.tif")
    assert x.shape == (1, 10, 20) and (x * 255).round().unique().tolist() == [10]


def test_gray_and_color(tmp_path: Path) -> None:
    _folder(tmp_path / "color", n=1)
    gray = ImageDataset(tmp_path / "color", image_size=8, channels=1)
    expected = np.array(Image.fromarray(_pixels()).convert("L"))
    assert torch.equal(gray[0]["x"], torch.from_numpy(expected)[None] / 255)
    Image.fromarray(expected).save(tmp_path / "gray.png")
    color = ImageDataset(tmp_path / "gray.png", image_size=8)
    assert torch.equal(color[0]["x"], gray[0]["x"].expand(3, 8, 8))


def test_a_damaged_image_is_named_or_skipped(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a")
    whole = (folder / "000.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("this is text")
    (folder / "void.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"cut\.png cannot be read as an image \(.*; remove it or set skip_corrupt=True"
    ):
        ImageDataset(folder, image_size=8)
    with pytest.warns(UserWarning, match=r"skipped 3 of 7 images.*cut\.png.*text\.png.*void\.jpg"):
        dataset = ImageDataset(folder, image_size=8, skip_corrupt=True)
    assert len(dataset) == len(dataset.names) == 4
    assert [Path(name).name for name in dataset.skipped] == ["cut.png", "text.png", "void.jpg"]


def test_a_damaged_image_in_a_shard_is_named_or_skipped(tmp_path: Path) -> None:
    shard = _shard(tmp_path / "a.npz", damaged=(1,))
    with pytest.raises(ValueError, match=r"a\.npz\[1\] cannot be read as an image \(its content is of no image format"):
        ImageDataset(shard, image_size=8)
    with pytest.warns(UserWarning, match="skipped 1 of 4"):
        dataset = ImageDataset(shard, image_size=8, skip_corrupt=True)
    assert dataset.skipped == [f"{shard}[1]"]
    assert torch.equal(dataset.images[1], torch.from_numpy(_pixels(seed=2)).permute(2, 0, 1))


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"none of the 1 images can be read, the first is .*a\.png"):
        ImageDataset(tmp_path, image_size=8, skip_corrupt=True)


def test_sources_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder, and no file matches"):
        ImageDataset(tmp_path / "nowhere-*.npz")
    with pytest.raises(ValueError, match="holds no images; expected files ending in"):
        ImageDataset(tmp_path)
    with pytest.raises(ValueError, match="source names no file"):
        ImageDataset([])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"hu": np.zeros(3)}, "it holds hu, not webp and offsets"),
        ({"webp": np.zeros(5, np.uint8), "offsets": np.array([0, 9])}, "offsets do not fit the 5 bytes"),
        ({"webp": np.zeros(5, np.uint8), "offsets": np.array([3, 0])}, "offsets do not fit"),
        ({"webp": np.zeros(5, np.uint8), "offsets": np.array([0])}, "offsets do not fit"),
        ({"webp": np.array([{}]), "offsets": np.array([0, 1])}, "is not a shard of images .*allow_pickle"),
        (None, "is not a shard of images"),
    ],
)
def test_a_file_that_is_no_shard_is_named(tmp_path: Path, arrays: dict[str, Any] | None, message: str) -> None:
    path = tmp_path / "a.npz"
    if arrays is None:
        path.write_text("text")
    else:
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as raised:
        ImageDataset(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("option", [{"split": "trian"}, {"channels": 2}, {"image_size": 0}, {"limit": 0}])
def test_unknown_options_are_named(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(option))} must be"):
        ImageDataset(tmp_path, **option)


def test_hidden_folders_and_results_are_no_data(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "data", n=2)
    for name in (".ipynb_checkpoints", "deeper/.thumbnails", "run/images"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(_pixels()).save(folder / name / "a.png")
    (folder / "run/records.jsonl").touch()
    expected = ["000.png", "deeper/001.png"]
    for source in (folder, str(folder / "**/*.png"), str(folder / "*")):
        with pytest.warns(UserWarning, match="run holds results of flowprox and is left out"):
            names = ImageDataset(source, 8).names
        assert [os.path.relpath(name, folder) for name in names] == expected
    assert len(ImageDataset(folder / "run", 8)) == len(ImageDataset(folder / "run/images/*", 8)) == 1  # it is named


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "data", n=2)
    _folder(tmp_path / "elsewhere", n=2)
    for name in ("cats", "cats-again"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    (folder / "deeper/round").symlink_to(folder)
    names = [os.path.relpath(name, folder) for name in ImageDataset(folder, 8).names]
    assert len(names) == 4 and sum(name.startswith("cats") for name in names) == 2


def test_names_of_any_bytes_have_a_split(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "data", n=20)
    os.rename(folder / "000.png", os.fsencode(folder) + b"/caf\xe9.png")
    names = ImageDataset(folder, 8).names
    assert len(names) == 20 and sorted(_joined(split_indices(names).values())) == list(range(20))
    assert ImageDataset(folder, 4, patches=2).images.shape[0] == 40


# Splits --------------------------------------------------------------------------------------------------------------


def test_adding_files_moves_no_other_one() -> None:
    names = [f"{i}.png" for i in range(2000)]
    before = split_indices(names)
    after = split_indices([f"new{i}.png" for i in range(500)] + names)
    for split, indices in before.items():
        assert [i - 500 for i in after[split] if i >= 500] == indices
    assert sorted(_joined(before.values())) == list(range(2000))
    assert abs(len(before["train"]) / 2000 - 0.9) < 0.02


def test_splits_of_a_folder_are_disjoint_and_do_not_depend_on_its_place(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", n=60)
    parts = {split: ImageDataset(folder, image_size=8, split=split).names for split in ("train", "val", "test")}
    assert sorted(_joined(parts.values())) == sorted(ImageDataset(folder, image_size=8).names)
    moved = folder.rename(tmp_path / "b")
    again = ImageDataset(moved, image_size=8, split="val").names
    assert [os.path.relpath(n, moved) for n in again] == [os.path.relpath(n, folder) for n in parts["val"]]


def test_shards_carry_their_split_in_their_name(tmp_path: Path) -> None:
    for name, n in (("train-0", 4), ("trainextra-0", 3), ("val-0", 2)):
        _shard(tmp_path / f"{name}.npz", n=n)
    assert len(ImageDataset(tmp_path, image_size=8, split="train")) == 4
    assert len(ImageDataset(tmp_path, image_size=8, split="val")) == 2
    assert len(ImageDataset(tmp_path / "train*.npz", image_size=8, split="train")) == 7
    with pytest.raises(ValueError, match="split 'val', which their names decide"):
        ImageDataset(tmp_path / "train*.npz", image_size=8, split="val")


# Single files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_images_come_back(tmp_path: Path, channels: int) -> None:
    x = torch.randint(0, 256, (channels, 5, 7)) / 255
    save_image(x[None], tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png"), x)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_saving_clips_but_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_image(torch.tensor([-0.2, 0.0, 1.0, 1.3]).view(1, 2, 2).requires_grad_(), path)
    assert load_image(path).flatten().tolist() == [0, 0, 1, 1]
    before = path.read_bytes()
    with pytest.raises(ValueError, match="NaN"):
        save_image(torch.full((3, 2, 2), float("nan")), path)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        save_image(torch.zeros(2, 4, 4), path)
    with pytest.raises(ValueError, match=r"must have shape \(C, H, W\)"):
        save_image(torch.zeros(2, 3, 4, 4), path)
    with pytest.raises(ValueError, match=r"path must end in \.png"):
        save_image(torch.zeros(3, 4, 4), tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_image(torch.zeros(3, 4, 4), tmp_path / "nowhere" / "a.png")
    assert path.read_bytes() == before


@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 6, 5)])
@pytest.mark.parametrize("alpha", [None, torch.linspace(0, 1, 30).view(6, 5)], ids=["opaque", "transparent"])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_picture_is_written_as_it_was_stored(
    tmp_path: Path, shape: tuple[int, int, int], alpha: torch.Tensor | None, bits: int
) -> None:
    form, x = PictureForm(bits, alpha), torch.rand(shape)
    x = x if alpha is None else alpha * x + (1 - alpha)  # on white
    save_image(x, tmp_path / "a.png", form)
    y, other = load_image(tmp_path / "a.png"), picture_form(tmp_path / "a.png")
    assert y.shape == shape and torch.allclose(y, x, atol=1e-4 if bits == 16 else 1.5 / 255)
    assert other.bits == bits and (other.alpha is None) == (alpha is None)
    if alpha is not None and other.alpha is not None:
        assert torch.allclose(other.alpha, alpha, atol=2 / 255)


def test_colors_of_16_bits_keep_their_precision(tmp_path: Path) -> None:
    pixels = np.arange(5 * 4 * 3, dtype=np.uint16).reshape(5, 4, 3) * 1000 + 7
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    x = load_image(tmp_path / "a.tif")
    assert torch.equal(x, torch.from_numpy(pixels.astype(np.float32) / 65535).movedim(-1, 0))
    assert load_image(tmp_path / "a.tif", channels=1).shape == (1, 5, 4)
    save_image(x, tmp_path / "a.png", picture_form(tmp_path / "a.tif"))
    assert torch.equal(load_image(tmp_path / "a.png"), x)


def test_16_bit_gray_keeps_its_precision(tmp_path: Path) -> None:
    values = np.array([[0, 1], [30000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    x = load_image(tmp_path / "a.png")
    assert x.shape == (1, 2, 2)
    torch.testing.assert_close(x[0], torch.from_numpy(values.astype(np.float32)) / 65535, rtol=0, atol=1e-7)
    assert load_image(tmp_path / "a.png", channels=3).shape == (3, 2, 2)
    eight = ImageDataset(tmp_path / "a.png", image_size=2, channels=1)
    assert eight.images.flatten().tolist() == [0, 0, 117, 255]


def test_float_tiff_must_lie_in_the_unit_interval(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.25]], np.float32)).save(tmp_path / "a.tif")
    assert load_image(tmp_path / "a.tif").flatten().tolist() == [0, 0.25]
    for bad in (2.0, -0.5, float("nan")):
        Image.fromarray(np.array([[0.0, bad]], np.float32)).save(tmp_path / "b.tif")
        with pytest.raises(ValueError, match=r"b\.tif holds values outside the range"):
            load_image(tmp_path / "b.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "a.png", transparency=1)
    else:
        image = Image.new(mode, (2, 1), (0,) * (len(mode) - 1) + (255,))
        image.putpixel((1, 0), (0,) * len(mode))
        image.save(tmp_path / "a.png")
    x = load_image(tmp_path / "a.png")
    assert x.shape == (1 if mode == "LA" else 3, 1, 2)
    assert x[..., 0].max() == 0
    assert x[..., 1].min() == 1


def test_load_image_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file '.*nothing\.png'"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="is a folder; give a regular file"):
        load_image(tmp_path)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"text\.png cannot be read as an image \(its content is of no image format"):
        load_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match="channels must be 1"):
        load_image(tmp_path / "text.png", channels=4)


# Measurements --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 5), (1, 1, 4, 5)), ((3, 4, 5), (1, 3, 4, 5)), ((2, 3, 4, 5), (2, 3, 4, 5))],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_measurements_of_any_float_type(
    tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...], dtype: Any
) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    np.save(tmp_path / "y.npy", array)
    y = load_measurement(tmp_path / "y.npy")
    assert y.shape == expected
    assert y.dtype == torch.float32
    assert np.array_equal(y.numpy().reshape(shape), array.astype(np.float32))


def test_an_image_file_is_a_measurement(tmp_path: Path) -> None:
    x = torch.randint(0, 256, (3, 4, 4)) / 255
    save_image(x, tmp_path / "y.png")
    assert torch.equal(load_measurement(tmp_path / "y.png", channels=3), x[None])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 4, 4), np.nan), "holds 48 NaN or infinite value"),
        (np.full((3, 4, 4), np.inf), "NaN or infinite"),
        (np.full((3, 4, 4), 200.0), "values up to 200; .* divide by 255"),
        (np.zeros((3, 4, 4), np.uint8), "holds uint8; .* divide 8-bit values by 255"),
        (np.zeros((3, 4, 4), complex), "holds complex128"),
        (np.zeros((4, 4, 3)), r"channels come first: save array\.transpose\(2, 0, 1\)"),
        (np.zeros((2, 4, 4)), "must have 1 or 3 channels"),
        (np.zeros(4), r"must have shape \(B, C, H, W\)"),
        (np.zeros((3, 0, 4)), r"must have shape \(B, C, H, W\)"),
        (np.zeros((1, 4, 4)), r"has 1 channel\(s\) but the model takes 3"),
        (np.array([{}], dtype=object), r"is not a plain \.npy array"),
    ],
)
def test_bad_measurements_are_named(tmp_path: Path, array: np.ndarray, message: str) -> None:
    path = tmp_path / "y.npy"
    np.save(path, array)
    with pytest.raises(ValueError, match=message) as raised:
        load_measurement(path, channels=3)
    assert str(path) in str(raised.value)


def test_files_that_are_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        load_measurement(tmp_path / "nothing.npy")
    (tmp_path / "a.npy").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"is not a plain \.npy array"):
        load_measurement(tmp_path / "a.npy")
    with open(tmp_path / "b.npy", "wb") as f:
        np.savez(f, a=np.zeros(3))
    with pytest.raises(ValueError, match=r"is an \.npz archive"):
        load_measurement(tmp_path / "b.npy")


# Files that ask for too much -----------------------------------------------------------------------------------------


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = struct.pack(">4s2I5B", b"IHDR", 13000, 13000, 8, 2, 0, 0, 0)
    chunks = b"\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(ValueError, match=r"169,000,000 pixels, more than 89,478,485; FLOWPROX_MAX_PIXELS=169000000"):
        load_image(tmp_path / "bomb.png")
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    monkeypatch.setenv("FLOWPROX_MAX_PIXELS", "199")
    with pytest.raises(ValueError, match="200 pixels, more than 199"):
        load_image(tmp_path / "a.png")


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.npy")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(ValueError, match="is a pipe or a device"):
            load_image(path)
    with pytest.raises(ValueError, match="is a pipe or a device"):
        load_measurement(tmp_path / "pipe.npy")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        ImageDataset("/dev/zero", 8)


def _declared(shape: str) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(8))
    content = file.getvalue()
    return content.replace(b"'shape': (8,), }" + b" " * (len(shape) - 4), f"'shape': {shape}, }}".encode())


def test_arrays_that_declare_terabytes_are_refused(tmp_path: Path) -> None:
    content = _declared("(3, 1000000, 1000000)")
    assert len(content) == 128 + 64
    (tmp_path / "y.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a plain \.npy array"):
        load_measurement(tmp_path / "y.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("webp.npy", content)
        archive.writestr("offsets.npy", content)
    with pytest.raises(ValueError, match=r"webp\.npy declares 24,000,000,000,000 bytes and holds"):
        ImageDataset(tmp_path / "a.npz", 8)


# Sampler -------------------------------------------------------------------------------------------------------------


def _epochs(sampler: ResumableSampler, n: int) -> list[list[int]]:
    return [batch for _ in range(n) for batch in sampler]


def test_every_epoch_is_another_permutation() -> None:
    batches = _epochs(ResumableSampler(12, 4, seed=1), 2)
    first, second = _joined(batches[:3]), _joined(batches[3:])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert _epochs(ResumableSampler(12, 4, seed=1), 2) == batches
    assert _epochs(ResumableSampler(12, 4, seed=2), 2) != batches


@pytest.mark.parametrize("done", range(9))
def test_continues_at_any_step(done: int) -> None:
    whole = _epochs(ResumableSampler(13, 4, seed=3), 3)
    interrupted = ResumableSampler(13, 4, seed=3)
    used: list[list[int]] = []
    while len(used) < done:
        for batch in interrupted:
            used.append(batch)
            if len(used) == done:
                break
    sought = ResumableSampler(13, 4, seed=3)
    sought.seek(done)
    assert (used + _epochs(sought, 4))[:9] == whole


@pytest.mark.parametrize("drop_last", [True, False])
def test_processes_share_each_batch(drop_last: bool) -> None:
    alone = _epochs(ResumableSampler(11, 4, drop_last=drop_last), 2)
    ranks = [_epochs(ResumableSampler(11, 4, rank=r, world_size=2, drop_last=drop_last), 2) for r in range(2)]
    assert len(alone) == len(ranks[0]) == len(ranks[1])
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert len(shares[0]) == len(shares[1])
        assert _joined(shares)[: len(whole)] == whole


def test_a_last_batch_smaller_than_the_number_of_processes_is_filled_up() -> None:
    samplers = [ResumableSampler(2, 8, rank=r, world_size=8, drop_last=False) for r in range(8)]
    assert [_epochs(sampler, 1) for sampler in samplers] == [[[s.order(0)[r % 2]]] for r, s in enumerate(samplers)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "must be positive"),
        ({"n": 4, "batch_size": 0}, "must be positive"),
        ({"n": 4, "batch_size": 8}, "4 images are fewer than one batch of 8"),
        ({"n": 4, "batch_size": 2, "rank": 2, "world_size": 2}, "rank must be in"),
        ({"n": 9, "batch_size": 3, "world_size": 2}, "must be a multiple of world_size"),
    ],
)
def test_bad_sampler_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableSampler(**arguments)
