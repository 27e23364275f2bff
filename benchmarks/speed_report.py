"""Table and picture of what ``speed.py`` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowprox.checkpoints import atomic_write

__all__ = ["best_peer", "figure", "table"]

_COLUMNS = (
    "task",
    "contender",
    "ms per image",
    "speed / best float32 peer",
    "speed / best peer",
    "GFLOP/s",
    "of ceiling",
)
_COLUMNS = (*_COLUMNS, "peak, MiB", "round trip")


def best_peer(rows: list[dict[str, Any]], task: str, key: str, float32_only: bool = True) -> float | None:
    """Smallest ``key`` of a peer in a task; by default of the peers as published, in float32."""
    found = [
        row[key]
        for row in rows
        if row["task"] == task and row["is_peer"] and key in row and not (float32_only and row["bfloat16"])
    ]
    return min(found) if found else None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: ceilings, then per task and contender time, ratios, rate, memory."""
    first, *results = rows
    lines = [
        f"{first['machine']}, torch {first['torch']}, preset {first['preset']}, {first['image_size']}x{first['image_size']}, "
        f"batch {first['batch_size']}, {first['clock']} clock",
        "",
        "| ceiling | GFLOP/s |",
        "|---|---|",
        *(f"| {name} | {rate:.0f} |" for name, rate in first["ceilings"].items()),
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
    ]
    before = None
    for row in results:
        peers = [best_peer(results, row["task"], "seconds_per_image", low) for low in (True, False)]
        ratios = ["" if peer is None else f"{peer / row['seconds_per_image']:.2f}" for peer in peers]
        cells = [
            "" if row["task"] == before else row["task"],
            row["contender"],
            f"{1e3 * row['seconds_per_image']:.1f}",
            *ratios,
            f"{row['gflops']:.0f}",
            f"{row['of_ceiling']:.0%}",
            f"{row['peak_mib']:.0f}" if "peak_mib" in row else "",
            f"{row['round_trip']:.0e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        before = row["task"]
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel per task: bars of images per second, peers in another colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first, *results = rows
    tasks = list(dict.fromkeys(row["task"] for row in results))
    fig, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks) + 1.2, 3.4), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        group = [row for row in results if row["task"] == task][::-1]
        colours = ["tab:grey" if row["is_peer"] else "tab:blue" for row in group]
        axis.barh([row["contender"] for row in group], [1 / row["seconds_per_image"] for row in group], color=colours)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("images per second", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", alpha=0.3)
    fig.suptitle(f"{first['preset']} Glow, {first['machine']}, batch {first['batch_size']}", fontsize=10)
    with atomic_write(path) as file:
        fig.savefig(file, format="png", dpi=130)
    plt.close(fig)
