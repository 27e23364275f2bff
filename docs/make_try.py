"""What the page "Try it" needs beside its script: two networks as ONNX, two pictures, and onnxruntime's WebAssembly from npm.

python docs/make_try.py        writes docs/_static/try; needs the extra onnx, and npm
"""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image
from skimage.data import chelsea

from flowprox.cli import main
from flowprox.samples import SAMPLES_FOLDER

OUT = Path(__file__).parent / "_static" / "try"
RUNTIME = "onnxruntime-web@1.30.0"
FILES = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
MODELS = {
    "denoiser.onnx": ["unfolded-denoising-natural", "--size", "128", "128", "--inputs", "sigma"],
    "inpainter.onnx": ["unfolded-inpainting-range-faces64", "--size", "64", "64", "--inputs", "mask"],
}


def fetch_runtime() -> None:
    """The three files of onnxruntime-web that run on every browser, from its package."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", RUNTIME], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.tgz")
        with tarfile.open(package) as archive:
            for name in FILES:
                content = archive.extractfile(f"package/dist/{name}")
                assert content is not None
                (OUT / name).write_bytes(content.read())


def make() -> None:
    """Whatever is missing in ``OUT``."""
    OUT.mkdir(exist_ok=True)
    Image.fromarray(chelsea()[:300, 75:375]).resize((128, 128), Image.Resampling.LANCZOS).save(OUT / "photo.png")
    (OUT / "portrait.png").write_bytes((SAMPLES_FOLDER / "astronaut.png").read_bytes())
    for name, words in MODELS.items():
        if not (OUT / name).exists() and main(["export", *words, "--out", str(OUT / name)]):
            raise SystemExit(f"{name} could not be exported")
    if not all((OUT / name).exists() for name in FILES):
        fetch_runtime()


if __name__ == "__main__":
    make()
