"""
Export
======

A trained network as one program for one operator, which runs without flowprox: torch's ``.pt2``, or ``.onnx`` for
onnxruntime and browsers. In a terminal: ``flowprox export unfolded-denoising-natural --size 128 128 --parameters
sigma=0.1 --out model.onnx``.
"""

import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import flowprox
from flowprox.samples import sample_images
from flowprox.unfolding import export_program

x = dict(sample_images())["chelsea"][None, :, :64, 32:96]
physics = flowprox.make_physics("denoising", (3, 64, 64), sigma=0.1)
y = physics(x, seed=0)
model = flowprox.load_model("unfolded-denoising-natural")

path = Path(tempfile.mkdtemp()) / "model.pt2"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the weights are channels-last; what is loaded is the same
    torch.export.save(export_program(model, physics, y.expand(2, -1, -1, -1)), path)

# %%
# What follows needs PyTorch alone. The batch size is open; the picture's size and the operator are fixed.

program = torch.export.load(path).module()
with torch.no_grad():
    x_hat = program(y)
    print(f"largest difference to the network: {(x_hat - model(y, physics)).abs().max():.1e}")

_, axes = plt.subplots(1, 3, figsize=(8, 2.9), layout="constrained")
for axis, title, picture in zip(axes, ["measured", "exported program", "truth"], [y, x_hat, x], strict=True):
    axis.imshow(picture[0].clamp(0, 1).permute(1, 2, 0))
    axis.set_title(title)
    axis.axis("off")
