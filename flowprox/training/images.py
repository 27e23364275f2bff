"""What a step of training sees: images in an order, and random numbers, that both follow from the step's number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Sampler

from flowprox.data import ImageDataset
from flowprox.options import DataOptions, NoiseOptions, TrainingOptions

_ON_DEVICE = 4 * 2**30  # bytes of training images up to which they are kept on the accelerator


def mixed_seed(*parts: str | int) -> int:
    """One seed, below 2^63, from several parts; neighboring numbers give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_global_generators(seed: int, device: torch.device) -> None:
    """For whatever draws from them, such as dropout; ``torch.manual_seed`` would take a stack trace every time."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class ResumableSampler(Sampler[list[int]]):
    """Batches of indices of n images in an order that depends only on (seed, epoch), to be continued at any step.

    Each pass goes from the current position to the end of the epoch. Process ``rank`` of ``world_size`` takes its share of each
    batch of ``batch_size``, so that a step sees the same images on any number of processes. Without ``drop_last`` a last,
    smaller batch is filled up to a multiple of world_size from the epoch's first images.

    Example:
        >>> sampler = ResumableSampler(n=6, batch_size=2, seed=0)
        >>> whole = list(sampler)
        >>> sampler.seek(1)
        >>> list(sampler) == whole[1:]
        True
    """

    def __init__(
        self, n: int, batch_size: int = 1, seed: int = 0, *, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"n and batch_size must be positive, got n={n}, batch_size={batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. world_size - 1, got rank={rank}, world_size={world_size}")
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a multiple of world_size {world_size}")
        if drop_last and n < batch_size:
            raise ValueError(f"{n} images are fewer than one batch of {batch_size}; use a smaller batch_size")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        """Batches in an epoch, wherever the position is."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        self.seek(self.epoch * len(self) + self.position)  # a finished epoch rolls over
        order = self.order(self.epoch)
        while self.position < len(self):
            start = self.position * self.batch_size
            self.position += 1
            batch = order[start : start + self.batch_size]
            while len(batch) % self.world_size:
                batch += order[: self.world_size - len(batch) % self.world_size]
            share = len(batch) // self.world_size
            yield batch[self.rank * share : (self.rank + 1) * share]
        self.epoch, self.position = self.epoch + 1, 0

    def order(self, epoch: int) -> list[int]:
        """All n indices in the order of an epoch."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.n, generator=generator).tolist()

    def seek(self, step: int) -> None:
        """Go to where ``step`` batches since the start of training have been used."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        self.epoch, self.position = divmod(step, len(self))


class TrainingImages:
    """Training and validation images of one process, uint8 (N, C, H, W), and its batches; there may be none to validate on.

    Of noise, which the task draws, they are blank images that take no memory. ``rank`` is one of ``world_size`` processes.

    Attributes:
        fingerprint: number and hash of the training and the validation images; empty for noise.
    """

    def __init__(
        self,
        data: DataOptions | NoiseOptions,
        options: TrainingOptions,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.options, self.device = options, device
        self.fingerprint: dict[str, str] = {}
        if isinstance(data, NoiseOptions):
            blank = torch.zeros(data.channels, 1, 1, dtype=torch.uint8)
            size, numbers = (data.image_size, data.image_size), (options.batch_size, options.n_validation_images)
            train, self.validation = (blank.expand(n, -1, *size) for n in numbers)
        else:
            train, self.validation = _read(data, options.n_validation_images)
            for part, images in (("training", train), ("validation", self.validation)):
                digest = hashlib.blake2b(images.numpy().data, digest_size=8).hexdigest()
                self.fingerprint[f"{part} images"] = f"{len(images)} of hash {digest}"
        self.train = train.to(device) if train.nbytes <= _ON_DEVICE else train
        self.sampler = self._make_sampler(rank, world_size)

    def __len__(self) -> int:
        return len(self.train)

    def _make_sampler(self, rank: int, world_size: int) -> ResumableSampler:
        n, batch_size, seed = len(self.train), self.options.batch_size, self.options.seed
        return ResumableSampler(n, batch_size, seed, rank=rank, world_size=world_size, drop_last=n >= batch_size)

    def batches(self, step: int) -> Iterator[Tensor]:
        """Clean batches (B, C, H, W) in [0, 1] without end, from that of ``step`` on."""
        self.sampler.seek(step)
        while True:
            yield from map(self._clean, self.sampler)

    def first(self, n: int) -> Tensor:
        """At most n images of the first batch of all processes together, the same in each."""
        return self._clean(next(iter(self._make_sampler(0, 1)))[:n])

    def _clean(self, indices: list[int]) -> Tensor:
        return self.to_float(self.train[torch.tensor(indices, device=self.train.device)])

    def to_float(self, images: Tensor) -> Tensor:
        """uint8 images as floats in [0, 1] on the device."""
        x = images.to(self.device).float().div_(255)
        return x.contiguous(memory_format=torch.channels_last) if self.options.channels_last else x

    def flip(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Half of the images mirrored, if the options ask for it."""
        if not self.options.horizontal_flip:
            return x
        mirrored = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
        return torch.where(mirrored, x.flip(-1), x)


def _read(data: DataOptions, n_validation: int) -> tuple[Tensor, Tensor]:
    """Training and validation images: two sources, or two parts of the split of one that consists of folders."""

    def images(source: str | list[str], split: str, limit: int | None) -> Tensor:
        options = {"patches": data.patches, "channels": data.channels, "skip_corrupt": data.skip_corrupt}
        return ImageDataset(source, data.image_size, split, limit=limit, **options).images

    sources = [data.train] if isinstance(data.train, str) else data.train
    has_parts = data.validation is None and all(Path(source).is_dir() for source in sources)
    train = images(sources, "train" if has_parts else "all", data.limit)
    if data.validation is None and not has_parts:
        return train, train[:0]
    validation = sources if data.validation is None else data.validation
    return train, images(validation, "val" if has_parts else "all", n_validation)
