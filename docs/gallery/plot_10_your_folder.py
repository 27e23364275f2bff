"""
Train on your folder
====================

A folder of pictures, one command, and a network that remembers its problem. The length is that of a demonstration:
``max_steps`` in the thousands is what the shipped networks had.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image
from skimage.data import astronaut, chelsea, coffee, rocket

import flowprox
from flowprox.cli import main
from flowprox.records import read_records

folder = Path(tempfile.mkdtemp())
(folder / "pictures").mkdir()
for load in (astronaut, chelsea, coffee, rocket):
    picture = load()
    for i in range(0, picture.shape[0] - 64, 64):
        for j in range(0, picture.shape[1] - 64, 64):
            name = f"{load.__name__}-{i}-{j}.png"
            Image.fromarray(picture[i : i + 64, j : j + 64]).save(folder / "pictures" / name)

# %%
# Every field of a recipe is an option; ``flowprox train-unfolded --help`` lists them. The recipe starts from the network
# for faces that ships, and goes on with these pictures. In a terminal this is
#
# .. code-block:: bash
#
#    flowprox train-unfolded --config unfolded-denoising-faces64 --model.pretrained unfolded-denoising-faces64 \
#        --training.max_steps 24 --training.validate_every 6 --data.train pictures --out run

words = "--config unfolded-denoising-faces64 --model.pretrained unfolded-denoising-faces64 --data.image_size 32"
words += " --training.max_steps 24 --training.validate_every 6 --training.batch_size 8 --training.precision 32"
words += f" --data.train {folder}/pictures --out {folder}/run"
assert main(["train-unfolded", *words.split()]) == 0

# %%
# The folder of the run holds the model, its card, the loss and pictures. The card makes the model usable by its path
# alone.

model = flowprox.load_model(folder / "run" / "model")
print(model.card.problem)
records = [record for record in read_records(folder / "run" / "metrics.jsonl") if "validation_psnr" in record]
plt.figure(figsize=(5, 3))
plt.plot([record["step"] for record in records], [record["validation_psnr"] for record in records], "o-")
plt.xlabel("step")
plt.ylabel("PSNR on other pictures (dB)")
plt.tight_layout()
