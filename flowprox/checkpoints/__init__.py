"""Models on disk: a folder with a card to read and weights that cannot run code.

    NAME/card.json            what the model is, how it was made, how to rebuild it (``Card``)
    NAME/model.safetensors    its tensors; the card holds their SHA-256

A model is rebuilt from the constructor call written in its card (see ``flowprox.naming``), never from a pickle, and gives
bitwise the outputs it gave when it was saved. Files appear whole or not at all, the card last: a full disk or a kill at any
moment leaves either the old model or the new one. Nothing here imports torch before a model is needed.
"""

from flowprox.checkpoints.card import CARD, PREVIOUS, WEIGHTS, Card, CheckpointError
from flowprox.checkpoints.hub import push_to_hub
from flowprox.checkpoints.store import (
    Pretrained,
    find_model,
    list_models,
    load_card,
    load_model,
    load_training_state,
    save_model,
    save_training_state,
)

__all__ = [
    "CARD", "Card", "CheckpointError", "PREVIOUS", "Pretrained", "WEIGHTS", "find_model", "list_models", "load_card",
    "load_model", "load_training_state", "push_to_hub", "save_model", "save_training_state",
]  # fmt: skip
