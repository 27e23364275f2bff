"""Constructor records: JSON values out, the same model in, nothing but registered classes built."""

from __future__ import annotations

import json

import pytest
from torch import nn

from flowprox.flows import Glow
from flowprox.naming import Specified, build, registered_kinds
from flowprox.prox import FlowProx
from flowprox.unfolding import UnfoldedPGD


def prox() -> FlowProx:
    return FlowProx(Glow(image_shape=(3, 8, 8), n_levels=1, n_steps=1, hidden_channels=4))


def test_survives_json_with_nested_and_tied_models() -> None:
    shared = prox()
    model = UnfoldedPGD([shared, prox(), shared])
    spec = json.loads(json.dumps(model.spec()))
    copy = build(spec)
    assert copy.proxes[0] is copy.proxes[2] and copy.proxes[0] is not copy.proxes[1]
    assert copy.spec() == model.spec()


def test_defaults_are_recorded() -> None:
    assert prox().flow.spec()["arguments"]["scale_bound"] == 0.5


def test_a_class_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind 'Popen'"):
        build({"kind": "Popen", "arguments": {"args": "true"}})
    assert "Glow" in registered_kinds()


def test_a_misspelt_argument_is_named() -> None:
    with pytest.raises(ValueError, match="n_step"):
        build({"kind": "Glow", "arguments": {"n_step": 3}})


def test_what_json_cannot_hold_is_refused() -> None:
    class Holder(Specified):
        def __init__(self, net: nn.Module) -> None:
            self.net = net

    with pytest.raises(TypeError, match="Linear"):
        Holder(nn.Linear(1, 1)).spec()
