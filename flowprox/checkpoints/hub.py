"""Models on the Hugging Face hub, named ``hf:ORG/NAME`` so that a misspelt path never goes to the network."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from flowprox.checkpoints.card import CARD, WEIGHTS, Card, CheckpointError, read_card, read_weights
from flowprox.files import first_line
from flowprox.naming import Values

HUB = "hf:"
"""Stands before the name of a model on the hub."""

_LICENSE = "LICENSE.md"
CONFIG = "config.json"
"""The file by whose requests the hub counts downloads."""


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    private: bool = True,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a saved model to the Hugging Face hub, in one commit, whose address it returns, with a README made from its card.
    CheckpointError where the folder is not a whole model, or the hub refused.

    Arguments:
        folder: a folder written by ``save_model``.
        repo_id: "ORG/NAME", with or without "hf:" before it; created if needed.
        private: whether a repository that is created is private.
        revision: branch to commit to; the main one by default.
        token: access token; by default the one stored by ``hf auth login``.
    """
    import huggingface_hub

    folder, repo_id = Path(folder), _repository(repo_id)
    card = read_card(folder / CARD)
    config = {"library_name": "flowprox", "model_type": card.model["kind"], "sha256": card.sha256}
    files = {
        CARD: (folder / CARD).read_bytes(),
        WEIGHTS: read_weights(folder, card),
        CONFIG: json.dumps(config, indent=2).encode(),
        "README.md": _readme(card, repo_id).encode(),
        _LICENSE: "\n\n".join(filter(None, [card.license, card.training.get("terms")])).encode() + b"\n",
    }
    operations = [huggingface_hub.CommitOperationAdd(path, data) for path, data in files.items()]
    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=f"{card.name} (flowprox)", revision=revision)
    except _hub_errors() as error:
        reason = f"{first_line(error)}; check the id and run `hf auth login`"
        raise CheckpointError(f"could not upload {folder} to {repo_id!r}: {reason}") from error
    return str(commit.commit_url)


def download(name: str, files: tuple[str, ...], revision: str | None) -> Path:
    """The folder of hub's cache that holds these files of a model "hf:ORG/NAME", fetched where needed; CheckpointError where
    there is no such model, it lacks a file, or the hub does not answer."""
    repo_id = _repository(name)
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=[CONFIG, *files])
    except _hub_errors() as error:
        remedy = "check name, revision and connection, and for a private model run `hf auth login`"
        raise CheckpointError(f"the hub could not be asked for {name!r} ({first_line(error)}); {remedy}") from error
    missing = [file for file in files if not (Path(folder) / file).is_file()]
    if missing:
        raise CheckpointError(f"{name!r} on the hub has no {missing[0]}: it is not a flowprox model")
    return Path(folder)


def _repository(name: str) -> str:
    """ORG/NAME from a name with or without the prefix."""
    repo_id = name.removeprefix(HUB)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo_id):
        raise CheckpointError(f"{name!r} names no model of the hub; write {HUB}ORG/NAME")
    return repo_id


def _hub_errors() -> tuple[type[Exception], ...]:
    """Failures of the hub, of ids and of the connection: the HTTP library's base class, whichever library it is."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)), OSError, ValueError)


def _readme(card: Card, repo_id: str) -> str:
    """The card as a Hugging Face model card."""
    import huggingface_hub

    images = str(card.training.get("data") or "unknown")
    figures = {key: value for key, value in card.metrics.items() if isinstance(value, float)}
    result = huggingface_hub.EvalResult
    results = [result("image-to-image", "images", images, key, value) for key, value in figures.items()]
    data = huggingface_hub.ModelCardData(
        library_name="flowprox",
        license="other",
        license_name="research-only",
        license_link=_LICENSE,
        pipeline_tag="image-to-image",
        tags=["normalizing-flow", "inverse-problems", "image-reconstruction"],
        **({"model_name": card.name, "eval_results": results} if results else {}),
    )
    sections = {"Input": card.preprocessing, "Problem it was trained for": card.problem, "Metrics": card.metrics}
    words: Values = {"card": card, "repo_id": repo_id, "images": images, "dumps": json.dumps}
    words["sections"] = {**sections, "Training": card.training, "Notes": card.notes}
    template = str(Path(__file__).with_name("readme.md"))
    return str(huggingface_hub.ModelCard.from_template(data, template, **words))
