"""Single images and measurements: read from files, checked, and written.

Images are float32 tensors (C, H, W) in [0, 1], upright, in sRGB, on white where they are transparent. What claims to be a
picture of more than ``FLOWPROX_MAX_PIXELS`` pixels (an environment variable; 89,478,485 by default, Pillow's limit), an
array larger than the free memory, a pipe or a device is refused before it is read.
"""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import tifffile
import torch
from deepinv.utils.io import load_dicom, load_ismrmrd_raw, load_mat
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_png

from flowprox.files import atomic_write, first_line
from flowprox.naming import require_package
from flowprox.operators.sensing import check_free

if TYPE_CHECKING:
    import h5py

StrPath = str | PathLike[str]

ARRAY_SUFFIXES = (".npy", ".mat", ".h5", ".hdf5", ".mrd")
SCAN_SUFFIXES = (".dcm", ".nii", ".nii.gz")

_MAX_PIXELS = 89_478_485
_NO_IMAGE = (
    "its content is of no image format; what scanners write is read under its own suffix, with the extra files: "
    f"{' '.join(SCAN_SUFFIXES)} {' '.join(ARRAY_SUFFIXES[1:])}"
)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
_ORIENTATION, _DEPTH = ExifTags.Base.Orientation, 258  # tags of EXIF and of TIFF


def load_image(path: StrPath, channels: int | None = None) -> Tensor:
    """Read an image file as float32 (C, H, W) in [0, 1].

    It is turned upright (EXIF) and converted to sRGB if it carries another color profile. Transparent pixels are put on white.
    Files of 16 bits keep their precision, color ones only where they need no turning and no conversion; a TIFF of floats
    must hold values in [0, 1]. Of several pages the first is read, with a warning. DICOM and NIfTI of one slice are read as
    ``load_stack`` does.

    Arguments:
        path: image file.
        channels: 3 turns gray into color, 1 color into gray (ITU-R 601); None keeps what the file has.

    Raises:
        FileNotFoundError: no such file.
        ImportError: DICOM or NIfTI without the package that reads it.
        ValueError: not an image, damaged, too large, or values outside [0, 1]; the message names the file.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (gray), 3 (color) or None (as in the file), got {channels}")
    if stack := load_stack(path) if suffix_of(path) in SCAN_SUFFIXES else None:
        x, *others = stack.slices
        if others:
            n = len(stack.slices)
            raise ValueError(f"{path} holds {n} slices; flowprox reconstruct takes them all, load_stack reads them")
    else:
        content = read_file(Path(path))
        image, deep = _open(content, str(path)), _deep_color(content)
        if channels == 1 and deep is None and not _is_deep(image):  # as Pillow rounds it
            image = _opaque(image).convert("L")
        x = from_pil(image, str(path)) if deep is None else deep
    if channels == 1 and len(x) == 3:
        return (x * torch.tensor(_LUMA).view(3, 1, 1)).sum(0, keepdim=True)
    return x.repeat(channels, 1, 1) if channels == 3 and len(x) == 1 else x


def from_pil(image: Image.Image, name: str) -> Tensor:
    """A Pillow image as float32 (C, H, W) in [0, 1], on white where it is transparent; ``name`` is for the error."""
    if _is_deep(image):
        return torch.from_numpy(_deep_gray(image, name))[None]
    image = _opaque(image)
    return as_float(torch.from_numpy(_pixels(image.convert("L" if image.mode in ("1", "L") else "RGB"))))


class PictureForm(NamedTuple):
    """How a picture is stored: 8 or 16 bits, and its opacity (H, W) in [0, 1] where it has transparent pixels."""

    bits: int = 8
    alpha: Tensor | None = None


def picture_form(path: StrPath) -> PictureForm:
    """How the picture in a file is stored, for one that takes its place; errors as in ``load_image``."""
    if suffix_of(path) in SCAN_SUFFIXES:
        return PictureForm(16)
    content = read_file(Path(path))
    form = form_of_pil(_open(content, str(path)))
    return form if _deep_color(content) is None else form._replace(bits=16)


def form_of_pil(image: Image.Image) -> PictureForm:
    """How a Pillow image is stored."""
    has_alpha = image.has_transparency_data
    alpha = as_float(torch.from_numpy(_pixels(image.convert("RGBA"))[3])) if has_alpha else None
    return PictureForm(16 if _is_deep(image) else 8, alpha)


_USUAL = PictureForm()


def save_image(x: Tensor, path: StrPath, form: PictureForm = _USUAL) -> None:
    """Write an image as a PNG file, whole or not at all.

    Arguments:
        x: (C, H, W) or (1, C, H, W), C 1 or 3; values are clipped to [0, 1].
        path: ends in .png; its folder must exist.
        form: 8 or 16 bits, and the opacity (H, W) of an image that was put on white, whose colors are taken off it again;
            left out where the image has another size.

    Raises:
        ValueError: x is not one image, or holds NaN or infinity; the path does not end in .png, or other bits.
        FileNotFoundError: the folder does not exist.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {str(path)!r}")
    if form.bits not in (8, 16):
        raise ValueError(f"bits must be 8 or 16, got {form.bits}")
    if x.ndim == 4 and len(x) == 1:
        x = x[0]
    _check_shape(x, "x", 3)
    if not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinite values and cannot be written as an image")
    pixels, content = _whole_numbers(x, form), io.BytesIO()
    if form.bits == 8:
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(content, format="PNG")
    with atomic_write(path, mode="wb") as f:
        f.write(content.getvalue() or _deep_png(pixels))


def as_pil(x: Tensor, form: PictureForm = _USUAL) -> Image.Image:
    """x (C, H, W) in [0, 1], clipped, as a Pillow image of that form; of colors it knows 8 bits only."""
    bits = form.bits if len(x) == 1 and form.alpha is None else 8
    pixels = _whole_numbers(x, form._replace(bits=bits))
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _whole_numbers(x: Tensor, form: PictureForm) -> np.ndarray:
    """x (C, H, W), clipped, as whole numbers (H, W, C), with its opacity last, if any, and its colors taken off the white."""
    x, alpha = x.detach().float().clamp(0, 1).cpu(), form.alpha
    if alpha is not None and alpha.shape == x.shape[1:]:
        x = torch.cat([torch.where(alpha > 0, (x - 1 + alpha) / alpha, 1.0).clamp(0, 1), alpha[None]])
    pixels = (x.double() * (2**form.bits - 1)).round().permute(1, 2, 0).numpy()
    return pixels.astype(np.uint8 if form.bits == 8 else np.uint16)


def load_measurement(path: StrPath, channels: int | None = None) -> Tensor:
    """Read a measurement as float32 (B, C, H, W), in the units of images in [0, 1].

    Arguments:
        path: an array of floats, (H, W), (C, H, W) or (B, C, H, W), in an .npy, .mat or HDF5 file, or an image file. Noise may
            leave [0, 1]. Of the latter two (B, H, W) will do; MATLAB has colors and slices last.
        channels: the number of channels that the model takes; None accepts 1 or 3.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an array, of objects or whole numbers, NaN, wrong dimensions or channels, values beyond 10.
    """
    file, name = Path(path), str(path)
    y = torch.from_numpy(_read_array(file, "f")) if suffix_of(file) in ARRAY_SUFFIXES else load_image(file)
    if y.ndim == 3 and y.shape[0] not in (1, 3) and suffix_of(file) != ".npy":
        y = y[:, None]
    if y.ndim == 2:
        y = y[None]
    if y.ndim == 3 and y.shape[0] not in (1, 3) and y.shape[-1] in (1, 3):
        raise ValueError(f"{name} has shape {tuple(y.shape)}; channels come first: save array.transpose(2, 0, 1)")
    y = y[None] if y.ndim == 3 else y
    _check_shape(y, name, 4)
    if channels is not None and y.shape[1] != channels:
        has = f"{name} has {y.shape[1]} channel(s)"
        raise ValueError(f"{has} but the model takes {channels}; convert it or use another model")
    _check_finite(y, name)
    if (largest := y.abs().max().item()) > 10:
        units = "a measurement is in the units of images in [0, 1]: divide by 255 if it was made from 8-bit images"
        raise ValueError(f"{name} holds values up to {largest:g}; {units}")
    return y


def load_array(path: StrPath, shape: Sequence[int]) -> Tensor:
    """Read measurements that are no pictures, such as those of compressed sensing or k-space, as float32 (B, *shape).

    Arguments:
        path: an array of floats, of ``shape`` or (B, *shape), in an .npy, .mat or HDF5 file; complex numbers, as of k-space,
            become two channels. Of ISMRMRD the lines of k-space are put on their grid, slice by slice.
        shape: of one measurement.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an array, of objects or whole numbers, NaN, another shape.
    """
    y, wanted = torch.from_numpy(_read_array(Path(path), "fc")), tuple(shape)
    y = torch.view_as_real(y).movedim(-1, -len(wanted)) if y.is_complex() else y
    y = y[None] if tuple(y.shape) == wanted else y
    if tuple(y.shape[1:]) != wanted or len(y) == 0:
        raise ValueError(f"{path} has shape {tuple(y.shape)} but the operator measures {wanted}, or (B, ...) of these")
    _check_finite(y, str(path))
    return y


def read_file(path: Path) -> bytes:
    """The bytes of a regular file, or an error that says what stands in its place."""
    _check_file(path)
    return path.read_bytes()


def _check_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"no file {str(path)!r}; check the path")
    if not path.is_file():
        raise ValueError(f"{path} is a {'folder' if path.is_dir() else 'pipe or a device'}; give a regular file")


def fitted(content: bytes, name: str, image_size: int | None, channels: int) -> np.ndarray:
    """8-bit pixels (C, H, W) of an image file's content, its central square resized; a ValueError begins with ``name``."""
    image = _open(content, name)
    if _is_deep(image):
        image = Image.fromarray((_deep_gray(image, name) * 255).round().astype(np.uint8))
    image = _opaque(image).convert("L" if channels == 1 else "RGB")
    if image_size is None:
        return _pixels(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return _pixels(image)


def as_float(pixels: Tensor) -> Tensor:
    """8-bit pixels as float32 in [0, 1]."""
    return pixels.to(torch.float32) / 255


# Pictures ------------------------------------------------------------------------------------------------------------


def _open(content: bytes, name: str) -> Image.Image:
    """The decoded image, upright and in sRGB."""
    limit = int(os.environ.get("FLOWPROX_MAX_PIXELS", _MAX_PIXELS))
    if limit > _MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit  # Pillow has a limit of its own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
        n = image.width * image.height
        if n > limit:
            raise ValueError(f"{n:,} pixels, more than {limit:,}; FLOWPROX_MAX_PIXELS={n} in the environment allows it")
        n_pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's MPO holds a preview too
        if n_pages > 1:
            remedy = "save each to a file of its own"
            warnings.warn(f"{name} holds {n_pages} pages, of which the first is read; {remedy}", stacklevel=4)
            image.seek(0)
        image.load()
        return _in_srgb(ImageOps.exif_transpose(image), name)
    # Pillow's decoders raise all of these for damaged files
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = _NO_IMAGE if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise ValueError(f"{name} cannot be read as an image ({reason})") from error


def _in_srgb(image: Image.Image, name: str) -> Image.Image:
    """The image with its colors converted from the profile it carries; as it is where that changes nothing visible."""
    profile = image.info.pop("icc_profile", None)
    if not profile or image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK", "P"):
        return image
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    mode = {"P": "RGB", "RGBA": "RGB", "LA": "L"}.get(image.mode)
    colors = image if mode is None else image.convert(mode)
    try:
        own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(own, srgb, colors.mode, "RGB")
        if colors.mode == "RGB" and _changes_nothing(transform):
            return image
        converted = ImageCms.applyTransform(colors, transform)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        warnings.warn(f"{name}: its color profile is of no use ({error}); it is taken as sRGB", stacklevel=5)
        return image
    assert converted is not None
    if colors.mode == "L":
        converted = converted.convert("L")
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a profile is sRGB but for rounding, as most that cameras and programs attach are."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
    after = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform)).astype(int)
    return int(np.abs(after - cube).max()) <= 3


def _deep_png(pixels: np.ndarray) -> bytes:
    """16-bit pixels (H, W, C), C 1 to 4, as a PNG file; Pillow writes such of gray only."""
    height, width, n = pixels.shape
    header = struct.pack(">2I5B", width, height, 16, (0, 4, 2, 6)[n - 1], 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels.astype(">u2"))  # each behind its filter, none
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _deep_color(content: bytes) -> Tensor | None:
    """A picture of 16 bits in color or with opacity as (C, H, W) in [0, 1], on white; None for others.

    Also None where it needs to be turned or converted, which Pillow can with 8 bits only.
    """
    image = Image.open(io.BytesIO(content))  # its header only
    if image.mode not in ("RGB", "RGBA") or image.info.get("icc_profile") or image.getexif().get(_ORIENTATION, 1) != 1:
        return None
    if image.format == "PNG" and content[24] == 16:
        x = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED).float()
    elif image.format == "TIFF" and max(image.tag_v2.get(_DEPTH, (8,))) == 16:  # type: ignore[attr-defined]
        x = torch.from_numpy(tifffile.imread(io.BytesIO(content), key=0).astype(np.float32)).movedim(-1, 0)
    else:
        return None
    x = x / 65535
    return x if len(x) % 2 else x[:-1] * x[-1:] + (1 - x[-1:])


def _opaque(image: Image.Image) -> Image.Image:
    """The image on white, where it is transparent."""
    if not image.has_transparency_data:
        return image
    mode, over = "L" if image.mode in ("L", "LA", "La") else "RGB", image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert(mode)


def _is_deep(image: Image.Image) -> bool:
    """Whether it is gray with more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _deep_gray(image: Image.Image, name: str) -> np.ndarray:
    """A 16-bit or float gray image as float32 (H, W) in [0, 1]."""
    values = np.asarray(image).astype(np.float32) / (1.0 if image.mode == "F" else 65535.0)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ValueError(f"{name} holds values outside the range of an image; rescale them to 8 or 16 bits")
    return values


def _pixels(image: Image.Image) -> np.ndarray:
    """The image as an array (C, H, W)."""
    return np.ascontiguousarray(np.atleast_3d(np.array(image)).transpose(2, 0, 1))


# What scanners write --------------------------------------------------------------------------------------------------


class Stack(NamedTuple):
    """The pictures of one file, and what they are in it.

    Arguments:
        slices: (N, C, H, W) in [0, 1].
        low, high: the values in the file that 0 and 1 stand for.
        affine: (4, 4), from voxels to millimetres, of NIfTI; None of other files.
    """

    slices: Tensor
    low: float
    high: float
    affine: np.ndarray | None = None


def load_stack(path: StrPath) -> Stack | None:
    """Read the slices of a DICOM or NIfTI file, or the pages of a TIFF that has several; None of any other file.

    Values that do not lie in [0, 1] are brought there: whole numbers of a TIFF by the largest of their type, all others by the
    range of the file's values. DICOM is rescaled to its units first. Slices of NIfTI lie along its third axis.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the package that reads it is not installed; the message names it and the extra.
        ValueError: damaged, or NaN; the message names the file.
    """
    file, suffix = Path(path), suffix_of(path)
    if suffix not in (*SCAN_SUFFIXES, ".tif", ".tiff"):
        return None
    content, affine, largest = io.BytesIO(read_file(file)), None, None
    if suffix == ".dcm":
        require_package("pydicom", "pydicom", file.name, extra="files")
        x = np.asarray(_told(file, "DICOM", lambda: load_dicom(str(file), as_tensor=False, apply_rescale=True)))
        is_color = x.ndim > 2 and x.shape[-1] == 3
    elif suffix in SCAN_SUFFIXES:
        nibabel = require_package("nibabel", "nibabel", file.name, extra="files")
        image = _told(file, "NIfTI", lambda: nibabel.load(file))
        x = _told(file, "NIfTI", lambda: image.get_fdata(dtype=np.float32))
        x, affine, is_color = np.moveaxis(x.reshape(*x.shape[:2], -1), -1, 0), image.affine, False
    else:
        with tifffile.TiffFile(content) as pages:
            if len(pages.series[0].pages) == 1:
                return None
            x, is_color = pages.asarray(), pages.series[0].axes.endswith("S")
        largest = np.iinfo(x.dtype).max if x.dtype.kind in "iu" else None
    x = np.moveaxis(x[..., :3], -1, -3) if is_color else x[..., None, :, :]
    slices = torch.from_numpy(x.reshape(-1, *x.shape[-3:]).astype(np.float32))
    _check_finite(slices, str(path))
    low, high = (0.0, float(largest)) if largest else (float(slices.min()), float(slices.max()))
    low, high = (0.0, 1.0) if 0 <= low and high <= 1 else (low, high)
    return Stack((slices - low) / ((high - low) or 1.0), low, high, affine)


def suffix_of(path: StrPath) -> str:
    """The suffix in small letters, that of a packed NIfTI whole."""
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


_Content = TypeVar("_Content")


def _told(path: Path, form: str, read: Callable[[], _Content]) -> _Content:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what deepinv calls in pydicom
            return read()
    except MemoryError:
        raise
    except Exception as error:  # each of these readers raises its own for damaged files, many of them a plain Exception
        raise ValueError(f"{path} cannot be read as {form} ({first_line(error)})") from error


# Arrays --------------------------------------------------------------------------------------------------------------


def _read_array(path: Path, kinds: str) -> np.ndarray:
    """The array of floats ("f") or complex numbers ("c") in a file."""
    _check_file(path)
    if suffix_of(path) != ".npy":
        array = _read_named(path)
    else:
        try:  # mapped, a header that declares too much fails at once
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            remedy = "write it with numpy.save, without objects"
            raise ValueError(f"{path} is not a plain .npy array ({error}); {remedy}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an .npz archive; give one array written with numpy.save")
    if array.dtype.kind not in kinds:
        units = "floats in the units of images in [0, 1]: divide 8-bit values by 255 and save as float32"
        raise ValueError(f"{path} holds {array.dtype}; a measurement holds {units}")
    check_free(4 * array.size, str(path))
    return np.array(array, dtype=np.complex64 if array.dtype.kind == "c" else np.float32, order="C")


def _read_named(path: Path) -> np.ndarray:
    """The array of a MAT or HDF5 file: its only one, or the one called kspace; slices first."""
    import h5py

    is_hdf5 = h5py.is_hdf5(path)
    if not is_hdf5 or suffix_of(path) == ".mat":  # of MATLAB 7.3, or before
        if is_hdf5:
            require_package("mat73", "mat73", path.name, extra="files")
        array = np.asarray(_one_of(_told(path, "MAT", lambda: load_mat(str(path), mat73=is_hdf5)), path))
        return array if array.ndim < 3 else np.moveaxis(array, -1, 0)  # it has slices last, as it has colors
    with h5py.File(path) as file:
        if "dataset/xml" not in file:
            arrays: dict[str, h5py.Dataset] = {}
            file.visititems(lambda name, item: arrays.update({name: item}) if isinstance(item, h5py.Dataset) else None)
            array = _one_of(arrays, path)
            check_free(math.prod(array.shape) * array.dtype.itemsize, str(path))
            return array[()]
    require_package("ismrmrd", "ismrmrd", path.name, extra="files")
    lines = _told(path, "ISMRMRD", lambda: load_ismrmrd_raw(str(path), ifft_slice_dim=True))
    y = lines[0].movedim(2, 0)  # (D, 2, n_coils, H, W)
    return (y[:, :, 0] if y.shape[2] == 1 else y).numpy()


def _one_of(arrays: Mapping[str, h5py.Dataset] | Mapping[str, np.ndarray], path: Path) -> h5py.Dataset | np.ndarray:
    found = {name: a for name, a in arrays.items() if hasattr(a, "dtype")}  # MATLAB files also hold text
    numbers = {name: a for name, a in found.items() if a.dtype.kind in "fciu" and math.prod(a.shape) > 1}
    if "kspace" in numbers:
        return numbers["kspace"]
    if len(numbers) != 1:
        listed = ", ".join(f"{name} {a.shape}" for name, a in numbers.items()) or "none"
        raise ValueError(f"{path} must hold one array, or one called kspace; it holds {listed}")
    return next(iter(numbers.values()))


def _check_shape(x: Tensor, name: str, n_dims: int) -> None:
    """Raise unless x has this number of dimensions and 1 or 3 channels."""
    expected = "(C, H, W)" if n_dims == 3 else "(B, C, H, W)"
    if x.ndim != n_dims or 0 in x.shape:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    if x.shape[-3] not in (1, 3):
        raise ValueError(f"{name} must have 1 or 3 channels in shape {expected}, got {tuple(x.shape)}")


def _check_finite(x: Tensor, name: str) -> None:
    """Raise if x holds NaN or infinity."""
    n = int((~torch.isfinite(x)).sum())
    if n:
        raise ValueError(f"{name} holds {n} NaN or infinite value(s); mend the file or mask these pixels")
