"""Training of flows, unfolded networks, denoisers and GANs. Nothing heavy is imported before a run starts."""

from flowprox.training.entry import TrainingResult, train_denoiser, train_flow, train_gan, train_unfolded

__all__ = ["TrainingResult", "train_denoiser", "train_flow", "train_gan", "train_unfolded"]
