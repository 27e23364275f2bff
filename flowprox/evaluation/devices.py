"""An evaluation on several devices: Lightning starts a process on each, every process takes a share of the cases.

A process writes its share as an evaluation of its own, into ``share-<number>`` of the results folder. The shares are taken up
into the common records when all are done, or, after an interruption, when the next run begins.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from flowprox.evaluation.comparison import Evaluation, EvaluationInterrupted, RunOptions, is_success
from flowprox.evaluation.plan import Case
from flowprox.evaluation_options import EvaluationOptions
from flowprox.records import RecordWriter, read_records

__all__ = ["absorb_shares", "run_on_devices"]

_FILES = ("records.jsonl", "tuning.jsonl")


def run_on_devices(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Run an evaluation on as many devices as its options say; the records of all, in the recipe's order.

    Raises:
        EvaluationInterrupted: on Ctrl-C; the message says how far it came.
    """
    out, run = evaluation.out, evaluation.options
    earlier = evaluation.begin()
    left = evaluation.unfinished({record["id"] for record in earlier})
    n = min(run.devices, len(left))
    try:
        if n > 1:
            fabric = Fabric(accelerator=run.device, devices=n, strategy="ddp_spawn")
            _give_what_is_known(out, n)
            shares, quiet = [left[i::n] for i in range(n)], replace(run, console=None)
            fabric.launch(_Share(evaluation.recipe, shares, out, quiet))
            absorb_shares(out)
        elif n == 1:
            return evaluation.run()
    except KeyboardInterrupt as error:
        # the processes may still be writing; the next run takes the shares up
        found = [
            *_read(out / "records.jsonl"),
            *(r for share in out.glob("share-*") for r in _read(share / "records.jsonl")),
        ]
        done = {record["id"] for record in found if is_success(record)}
        n_done, n_units = sum(i in done for i in evaluation.ids()), len(list(evaluation.ids()))
        raise EvaluationInterrupted(
            f"{n_done} of {n_units} reconstructions are recorded in {out}; the same command continues the run"
        ) from error
    found = {record["id"]: record for record in read_records(out / "records.jsonl")}
    ordered = [found.pop(i) for i in evaluation.ids()]
    with RecordWriter(out / "records.jsonl") as writer:  # in the recipe's order, as one device would have left them
        for record in [*ordered, *found.values()]:
            writer.write(record)
    return ordered


def absorb_shares(out: Path) -> None:
    """Take the records, tuning and pictures of shares up into ``out``, and remove the shares."""
    shares = sorted(out.glob("share-*"))
    for name in _FILES:
        found = [record for share in shares for record in _read(share / name)]
        if not found:
            continue
        with RecordWriter(out / name, resume=True) as writer:
            known = {record["id"] for record in writer.records if is_success(record)}
            for record in found:
                if record["id"] not in known:
                    writer.write(record)
    for share in shares:
        for picture in share.glob("images/*.png"):
            (out / "images").mkdir(exist_ok=True)
            os.replace(picture, out / "images" / picture.name)
        shutil.rmtree(share)


def _give_what_is_known(out: Path, n: int) -> None:
    """Each share begins with the records and tuning of all, so that nothing is done twice."""
    for rank in range(n):
        (out / f"share-{rank}").mkdir()
        for name in _FILES:
            if (out / name).exists():
                shutil.copy2(out / name, out / f"share-{rank}" / name)


class _Share:
    """What a process runs; Lightning looks into collections and records that it hands on, and not into this."""

    def __init__(self, recipe: EvaluationOptions, shares: Sequence[Sequence[Case]], out: Path, run: RunOptions) -> None:
        self.recipe, self.shares, self.out, self.run = recipe, shares, out, run

    def __call__(self, fabric: Fabric) -> None:
        rank, run = fabric.global_rank, replace(self.run, device=str(fabric.device), devices=1)
        Evaluation(self.recipe, self.shares[rank], self.out / f"share-{rank}", run).run()


def _read(path: Path) -> list[dict[str, Any]]:
    return read_records(path) if path.exists() or path.with_name(path.name + ".partial").exists() else []
