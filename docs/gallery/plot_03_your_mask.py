"""
Your mask
=========

Scratches and writing are taken out of a photograph: white pixels of the mask are kept, black ones are filled in.
The denoiser of photographs serves as the prior of plug and play, so that nothing is trained for the mask.
"""

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw
from skimage.data import chelsea

import flowprox

clean = chelsea()[40:168, 80:240]  # (128, 160, 3), uint8; Chelsea the cat, CC0, Stefan van der Walt
mask = Image.new("L", (160, 128), "white")
draw = ImageDraw.Draw(mask)
for line in ([(5, 20), (150, 60)], [(30, 120), (120, 5)], [(70, 127), (155, 80)]):
    draw.line(line, fill="black", width=3)
draw.text((20, 85), "your mask", fill="black", font_size=24)

damaged = np.where(np.asarray(mask)[..., None] > 0, clean, 255).astype(np.uint8)
restored = flowprox.restore(damaged, mask=mask, sigma=0.0, truth=clean)

# %%

_, axes = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
for axis, title, picture in zip(
    axes, ["damaged", "mask", f"restored, {restored.psnr:.1f} dB"], [damaged, mask, restored.image], strict=True
):
    axis.imshow(picture, cmap="gray")
    axis.set_title(title)
    axis.axis("off")
