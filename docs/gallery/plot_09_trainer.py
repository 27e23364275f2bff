"""
deepinv.Trainer with UnfoldedPGD
================================

``UnfoldedPGD`` is a ``deepinv.models.Reconstructor``, so that ``deepinv.Trainer`` trains it as any network. A
minute of a GPU is another matter; here it sees a few dozen patches of four photographs.
"""

import deepinv
import matplotlib.pyplot as plt
import torch
from skimage.data import astronaut, chelsea, coffee, rocket
from torch.utils.data import DataLoader

import flowprox

torch.manual_seed(0)
photographs = [torch.from_numpy(load().copy()).permute(2, 0, 1) / 255 for load in (astronaut, chelsea, coffee, rocket)]
patches = torch.cat(
    [photo.unfold(1, 32, 48).unfold(2, 32, 48).permute(1, 2, 0, 3, 4).flatten(0, 1) for photo in photographs]
)
patches = patches[torch.randperm(len(patches))]

# %%
# Two folds; the prox of each is a small flow. ``x_hat = g(f(v) / (1 + lambda))`` after a gradient step to v (Wei et
# al. 2022).

physics = flowprox.make_physics("denoising", (3, 32, 32), sigma=0.2)
flows = [flowprox.Glow((3, 32, 32), n_levels=2, n_steps=2, hidden_channels=16) for _ in range(2)]
model = flowprox.UnfoldedPGD([flowprox.FlowProx(flow) for flow in flows], start="adjoint")
with torch.no_grad():
    model(physics(patches[:32]), physics)  # a flow sets its scales from the first images that it sees

trainer = deepinv.Trainer(
    model=model,
    physics=physics,
    optimizer=torch.optim.Adam(model.parameters(), lr=3e-3),
    train_dataloader=DataLoader(patches[:128], batch_size=16),
    eval_dataloader=DataLoader(patches[128:160], batch_size=32),
    online_measurements=True,
    epochs=5,
    device="cpu",
    save_path=None,
    show_progress_bar=False,
    non_blocking_transfers=False,
    verbose=False,
)
model = trainer.train()

# %%

plt.figure(figsize=(5, 3))
plt.plot(range(1, 6), trainer.train_metrics_history["PSNR"], label="training patches")
plt.plot(range(1, 6), trainer.eval_metrics_history["PSNR"], label="other patches")
plt.xlabel("epoch")
plt.ylabel("PSNR (dB)")
plt.legend()
plt.tight_layout()
