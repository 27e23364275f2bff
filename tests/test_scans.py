"""What scanners and other programs write: read as slices in [0, 1] or as arrays, and NIfTI written again where it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import tifffile
import torch

import flowprox
from flowprox.cli import main
from flowprox.data import load_array, load_image, load_measurement, load_stack

HU = np.arange(4 * 6, dtype=np.int16).reshape(4, 6) - 1000  # of a computed tomograph
VOLUME = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)  # (X, Y, Z)
AFFINE = np.diag([-2.0, 2.0, 3.0, 1.0]) + np.eye(4, k=3) * 7
KSPACE = np.random.default_rng(1).normal(size=(2, 8, 6, 2)).astype(np.float32).view(np.complex64)[..., 0]


def write_dicom(path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = *HU.shape, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept = 2, -1000
    data.PixelData = ((HU + 1000) // 2).astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)


def write_nifti(path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(VOLUME, AFFINE), path)


def write_hdf5(path: Path, **arrays: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def write_mat73(path: Path) -> None:
    pytest.importorskip("mat73")
    with h5py.File(path, "w", userblock_size=512) as file:
        file["x"] = VOLUME.T.astype(np.float64)  # MATLAB's order
        file["x"].attrs["MATLAB_class"] = np.bytes_("double")
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM")


def write_ismrmrd(path: Path) -> None:
    """Lines of two coils, each twice as long as the image is wide."""
    ismrmrd = pytest.importorskip("ismrmrd")
    xsd = ismrmrd.xsd
    space = lambda n: xsd.encodingSpaceType(  # noqa: E731
        matrixSize=xsd.matrixSizeType(x=n, y=8, z=1), fieldOfView_mm=xsd.fieldOfViewMm(x=n, y=8.0, z=1.0)
    )
    limits = {
        "kspace_encoding_step_1": xsd.limitType(minimum=0, maximum=7, center=4),
        "kspace_encoding_step_2": xsd.limitType(minimum=0, maximum=0, center=0),
    }
    limits |= {name: None for name in ("average", "slice", "contrast", "phase", "repetition", "set")}
    encoding = xsd.encodingType(
        encodedSpace=space(6),
        reconSpace=space(6),
        encodingLimits=xsd.encodingLimitsType(**limits),
        trajectory=xsd.trajectoryType.CARTESIAN,
    )
    header = xsd.ismrmrdHeader(
        experimentalConditions=xsd.experimentalConditionsType(H1resonanceFrequency_Hz=1),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(receiverChannels=2),
        encoding=[encoding],
    )
    data = ismrmrd.Dataset(str(path), create_if_needed=True)
    data.write_xml_header(xsd.ToXML(header))
    for i in range(8):
        line = ismrmrd.Acquisition.from_array(KSPACE[:, i])
        line.idx.kspace_encode_step_1 = i
        data.append_acquisition(line)
    data.close()


# Pictures -------------------------------------------------------------------------------------------------------------

STACKS: dict[str, tuple[Callable[[Path], object], np.ndarray, tuple[float, float]]] = {
    "a.dcm": (write_dicom, HU[None, None] // 2 * 2, (-1000, -978)),
    "a.nii.gz": (write_nifti, np.moveaxis(VOLUME, -1, 0)[:, None], (VOLUME.min(), VOLUME.max())),
    "a.nii": (write_nifti, np.moveaxis(VOLUME, -1, 0)[:, None], (VOLUME.min(), VOLUME.max())),
    "gray.tif": (
        lambda path: tifffile.imwrite(path, (HU + 1000).astype("u2")[None].repeat(2, 0)),
        HU + 1000,
        (0, 65535),
    ),
    "color.tif": (
        lambda path: tifffile.imwrite(path, np.full((2, 4, 6, 3), 51, "u1"), photometric="rgb"),
        np.full((2, 3, 4, 6), 51),
        (0, 255),
    ),
    "unit.tif": (lambda path: tifffile.imwrite(path, np.full((2, 4, 6), 0.25, "f4")), np.array(0.25), (0, 1)),
}


@pytest.mark.parametrize("name", STACKS)
def test_slices_come_into_the_unit_interval(name: str, tmp_path: Path) -> None:
    write, values, (low, high) = STACKS[name]
    write(tmp_path / name)
    stack = load_stack(tmp_path / name)
    assert stack is not None and (stack.low, stack.high) == (low, high)
    assert stack.slices.min() >= 0 and stack.slices.max() <= 1
    in_file = stack.slices.numpy() * (high - low) + low
    np.testing.assert_allclose(in_file, np.broadcast_to(values, in_file.shape), atol=1e-3)


def test_one_slice_is_an_image(tmp_path: Path) -> None:
    write_dicom(tmp_path / "scan.dcm")
    assert load_image(tmp_path / "scan.dcm", channels=3).shape == (3, 4, 6)
    restored = flowprox.restore(tmp_path / "scan.dcm", sigma=0.1)
    assert restored.image.size == (6, 4) and restored.image.mode.startswith("I")  # 16 bits
    write_nifti(tmp_path / "scan.nii")
    with pytest.raises(ValueError, match="holds 3 slices; flowprox reconstruct takes them all"):
        load_image(tmp_path / "scan.nii")
    assert load_stack(tmp_path / "photo.png") is None


def test_nifti_comes_back_with_its_affine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_nifti(tmp_path / "head.nii.gz")
    words = "reconstruct --method adjoint --problem denoising --parameters sigma=0.1 --measured --out".split()
    assert main([*words, str(tmp_path / "out"), "--", str(tmp_path / "head.nii.gz")]) == 0
    assert f"0 is {VOLUME.min():g} in the file" in " ".join(capsys.readouterr().out.split())
    import nibabel

    written = nibabel.load(tmp_path / "out" / "head.nii.gz")
    np.testing.assert_allclose(written.affine, AFFINE)
    np.testing.assert_allclose(written.get_fdata(), VOLUME, atol=1e-4)
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {f"head-{i}.png" for i in range(3)}


# Arrays ---------------------------------------------------------------------------------------------------------------

ARRAYS: dict[str, tuple[Callable[[Path], object], tuple[int, ...]]] = {
    "gray.mat": (lambda path: scipy.io.savemat(path, {"x": VOLUME[..., 0], "level": 0.1}), (1, 1, 6, 4)),
    "color.mat": (lambda path: scipy.io.savemat(path, {"x": VOLUME}), (1, 3, 6, 4)),
    "slices.mat": (lambda path: scipy.io.savemat(path, {"x": VOLUME.repeat(2, -1)}), (6, 1, 6, 4)),
    "new.mat": (write_mat73, (1, 3, 6, 4)),
    "slices.h5": (lambda path: write_hdf5(path, x=VOLUME), (6, 1, 4, 3)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_other_programs_are_measurements(name: str, tmp_path: Path) -> None:
    write, shape = ARRAYS[name]
    write(tmp_path / name)
    y = load_measurement(tmp_path / name)
    assert y.shape == shape
    first = VOLUME[0] if name == "slices.h5" else VOLUME[..., 0]
    np.testing.assert_allclose(y[0, 0], first, rtol=1e-6)


@pytest.mark.parametrize("name", ["fastmri.h5", "raw.h5", "raw.mrd"])
def test_kspace_has_its_parts_as_channels(name: str, tmp_path: Path) -> None:
    if name == "fastmri.h5":
        write_hdf5(tmp_path / name, kspace=KSPACE[None], reconstruction_rss=VOLUME)
    else:
        write_ismrmrd(tmp_path / name)
    y = load_array(tmp_path / name, (2, 2, 8, 6))
    np.testing.assert_allclose(torch.complex(y[0, 0], y[0, 1]), KSPACE, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pydicom", "nibabel"):
        pytest.importorskip(package)
    write_hdf5(tmp_path / "two.h5", a=VOLUME, b=VOLUME)
    with pytest.raises(ValueError, match=r"must hold one array, or one called kspace; it holds a \(6, 4, 3\), b"):
        load_measurement(tmp_path / "two.h5")
    for name in ("bad.dcm", "bad.nii", "bad.mat"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 20)
        with pytest.raises(ValueError, match=f"{name} cannot be read as"):
            (load_measurement if name == "bad.mat" else load_stack)(tmp_path / name)
    (tmp_path / "scan.nrrd").write_bytes(b"NRRD0004")
    with pytest.raises(ValueError, match=r"with the extra files: \.dcm"):
        load_image(tmp_path / "scan.nrrd")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"bad\.dcm needs the package pydicom: pip install .*\(the extra files\)"):
        load_stack(tmp_path / "bad.dcm")
