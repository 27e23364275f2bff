"""Table and picture of what ``speed.py`` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowprox.files import atomic_write

__all__ = ["best_peer", "figure", "slower_than_plain", "table"]

_COLUMNS = ["task", "contender", "ms per image", "speed / plain", "speed / float32 peer", "speed / any peer", "GFLOP/s"]
_COLUMNS += ["of ceiling", "peak, MiB", "round trip"]


def best_peer(rows: list[dict[str, Any]], task: str, key: str, float32_only: bool = True) -> float | None:
    """Smallest ``key`` of a peer in a task; by default of the peers as published, in float32."""
    found = [
        row[key]
        for row in rows
        if row["task"] == task and row["is_peer"] and key in row and not (float32_only and row["bfloat16"])
    ]
    return min(found) if found else None


def plain_value(rows: list[dict[str, Any]], task: str, key: str) -> float | None:
    """``key`` of our plain path in float32."""
    return next((row[key] for row in rows if row["task"] == task and row["contender"] == "plain"), None)


def slower_than_plain(rows: list[dict[str, Any]], margin: float) -> list[str]:
    """A line for every task in which the fast path has less than ``margin`` times the speed of the plain one."""
    lines = []
    for row in rows[1:]:
        plain = plain_value(rows[1:], row["task"], "seconds_per_image")
        if row["contender"] == "fast" and plain is not None and plain < margin * row["seconds_per_image"]:
            ratio = plain / row["seconds_per_image"]
            lines.append(f"slower than plain: {row['task']}, {ratio:.2f} times its speed (expected at least {margin})")
    return lines


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
        others = [plain_value(results, row["task"], "seconds_per_image")]
        others += [best_peer(results, row["task"], "seconds_per_image", low) for low in (True, False)]
        ratios = ["" if other is None else f"{other / row['seconds_per_image']:.2f}" for other in others]
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
    """One panel per task: bars of images per second, peers in another color."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first, *results = rows
    tasks = list(dict.fromkeys(row["task"] for row in results))
    fig, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks) + 1.2, 3.4), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        group = [row for row in results if row["task"] == task][::-1]
        colors = [_color(row) for row in group]
        axis.barh([row["contender"] for row in group], [1 / row["seconds_per_image"] for row in group], color=colors)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("images per second", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", alpha=0.3)
    fig.suptitle(f"{first['preset']} Glow, {first['machine']}, batch {first['batch_size']}", fontsize=10)
    with atomic_write(path) as file:
        fig.savefig(file, format="png", dpi=130)
    plt.close(fig)


def _color(row: dict[str, Any]) -> str:
    if row["is_peer"]:
        return "tab:gray"
    return "tab:orange" if row["contender"].startswith("plain") else "tab:blue"
