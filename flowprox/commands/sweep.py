"""The command that trains one recipe with many settings."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

from flowprox.commands.terminal import check_yaml, find_recipe, print_table
from flowprox.naming import Values

_KEYS = {"command": str, "config": str, "options": dict, "grid": dict}


def sweep(recipe: str, out: str = "runs/sweep") -> int:
    """Train with every combination of the values in a grid, one run after the other; the same command continues.

    The recipe is a YAML file such as

        command: train-flow
        config: glow-faces64
        options: {data.train: FOLDER}
        grid: {training.learning_rate: [0.001, 0.0003], likelihood.bit_depth: [5, 8]}

    Arguments:
        recipe: the YAML file: command, the training command; config, its recipe by path or name; options, what holds for all
            runs; grid, the values of each option.
        out: folder that gets one folder for each run.
    """
    import yaml

    from flowprox.files import sole_writer
    from flowprox.records import RecordWriter

    path = Path(recipe)
    check_yaml(path)
    plan: Values = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check(plan, recipe)
    config = find_recipe(plan["config"])
    names, failed = list(plan["grid"]), 0
    combinations = [dict(zip(names, values, strict=True)) for values in itertools.product(*plan["grid"].values())]
    with sole_writer(out), RecordWriter(Path(out, "sweep.jsonl"), resume=True) as records:
        for number, setting in enumerate(combinations, start=1):
            run = Path(out, _name(setting))
            options = {**plan.get("options", {}), **setting}
            done = next((r for r in records.records if r["options"] == options and r["run"] == run.name), None)
            print(f"run {number} of {len(combinations)}: {run}" + (" (is done)" if done else ""), flush=True)
            if done:
                continue
            words = [f"--{key}={one if isinstance(one, str) else json.dumps(one)}" for key, one in options.items()]
            command = [plan["command"], "--config", str(config), *words, "--out", str(run), "--resume"]
            status = subprocess.run([sys.executable, "-m", "flowprox", *command]).returncode
            if status == 130:
                raise KeyboardInterrupt("the same command continues")
            failed += status != 0
            if not status:
                from flowprox.checkpoints import load_card

                metrics = {
                    key: value for key, value in load_card(run).metrics.items() if isinstance(value, int | float)
                }
                records.write({"id": run.name, "run": run.name, "options": options, "metrics": metrics})
        figures = list(dict.fromkeys(key for record in records.records for key in record["metrics"]))
        rows = [
            [record["run"], *(str(record["options"].get(name)) for name in names)]
            + [f"{record['metrics'][key]:.4g}" if key in record["metrics"] else "-" for key in figures]
            for record in records.records
        ]
        if rows:
            print_table(["run", *(name.rpartition(".")[2] for name in names), *figures], rows)
    return 1 if failed else 0


def _check(plan: Values, recipe: str) -> None:
    for key, value in plan.items():
        if not isinstance(value, _KEYS.get(key, ())):
            raise ValueError(
                f"{recipe}: {key} must be one of {', '.join(_KEYS)}, texts the first two; got {value!r:.60}"
            )
    for key in ("command", "config", "grid"):
        if not plan.get(key):
            raise ValueError(f"{recipe} lacks {key}; see flowprox sweep --help")
    if not str(plan["command"]).startswith("train-"):
        raise ValueError(f"{recipe}: command must be one of training, such as train-flow; got {plan['command']!r}")
    for key, values in plan["grid"].items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{recipe}: grid.{key} must be a list of values, got {values!r:.60}")


def _name(setting: Values) -> str:
    """A folder's name that tells the setting, and no other one."""
    whole = ",".join(f"{key.rpartition('.')[2]}={json.dumps(value)}" for key, value in setting.items())
    name = re.sub(r"[^\w.=,+-]+", "-", whole)[:200]
    keys = [key.rpartition(".")[2] for key in setting]
    if name == whole and len(set(keys)) == len(keys):
        return name
    return f"{name}-{hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:8]}"
