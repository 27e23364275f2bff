"""The order in which training sees the images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class ResumableSampler(Sampler[list[int]]):
    """Batches of indices in an order that depends only on (seed, epoch), to be continued at any step.

    A batch sampler: ``DataLoader(dataset, batch_sampler=sampler)``. Each pass goes from the current position to the end
    of the epoch; the next one begins the next epoch. Under data-parallel training every process takes its share of each
    batch, so that a step sees the same images on any number of processes.

    A loader with worker processes asks for batches ahead of training: then restore with ``seek(step)``, which needs
    only the number of training steps done.

    Arguments:
        n: number of images.
        batch_size: images per step, over all processes.
        seed: of the order.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes; it divides batch_size.
        shuffle: without it the order is 0 to n - 1 in every epoch.
        drop_last: leave out the last, smaller batch; otherwise it is filled up to a multiple of world_size from the
            epoch's first images.

    Raises:
        ValueError: a number out of range, or fewer images than one batch with drop_last.

    Example:
        >>> sampler = ResumableSampler(n=6, batch_size=2, seed=0)
        >>> whole = list(sampler)
        >>> sampler.seek(1)
        >>> list(sampler) == whole[1:]
        True
    """

    def __init__(
        self,
        n: int,
        batch_size: int = 1,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
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
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.drop_last = shuffle, drop_last
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
            yield self._share(order, start)
        self.epoch, self.position = self.epoch + 1, 0

    def order(self, epoch: int) -> list[int]:
        """All n indices in the order of an epoch."""
        if not self.shuffle:
            return list(range(self.n))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self.n, generator=generator).tolist()

    def _share(self, order: list[int], start: int) -> list[int]:
        batch = order[start : start + self.batch_size]
        while len(batch) % self.world_size:
            batch += order[: self.world_size - len(batch) % self.world_size]
        share = len(batch) // self.world_size
        return batch[self.rank * share : (self.rank + 1) * share]

    def seek(self, step: int) -> None:
        """Go to where ``step`` batches since the start of training have been used."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        self.epoch, self.position = divmod(step, len(self))
