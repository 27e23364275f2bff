"""Packed convolutions compute what ``conv2d`` does, for every shape, precision and number of threads, and fall back to it."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from flowprox.flows import Glow, frozen
from flowprox.flows.conditioners import PackedConvolution

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def reference(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    y = F.conv2d(x.double(), weight.double(), bias.double(), padding=weight.shape[-1] // 2)
    return y.relu() if relu else y


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= BOUNDS[dtype] * expected.abs().max()


@every_dtype
@pytest.mark.parametrize(("n_in", "n_out", "size"), [(3, 16, 3), (16, 16, 1), (16, 6, 3), (5, 7, 5)])
@pytest.mark.parametrize("relu", [True, False])
def test_every_shape_gives_the_convolution(dtype: torch.dtype, n_in: int, n_out: int, size: int, relu: bool) -> None:
    weight, bias = torch.randn(n_out, n_in, size, size).to(dtype), torch.randn(n_out).to(dtype)
    convolve = PackedConvolution(weight, bias)
    for n, height, width in ((4, 8, 8), (1, 8, 8), (4, 8, 8), (3, 5, 12), (1, 32, 32), (4, 8, 8)):
        x = torch.randn(n, n_in, height, width).to(dtype).to(memory_format=torch.channels_last)
        before = x.clone()
        assert_close(convolve(x, relu), reference(x, weight, bias, relu), dtype)
        assert torch.equal(x, before)


def test_weights_are_packed_where_they_can_be() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    convolve = PackedConvolution(torch.randn(4, 3, 3, 3), torch.randn(4))
    for size in (4, 8, 16):
        convolve(torch.randn(2, 3, size, size))
    assert [shape[-1] for shape in convolve._blocks] == [8, 16]  # of the last two shapes
    double = PackedConvolution(torch.randn(4, 3, 3, 3).double(), torch.randn(4).double())
    double(torch.randn(2, 3, 8, 8).double())
    assert not double._blocks


def test_without_onednn_the_plain_convolution_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight, bias, x = torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(2, 3, 8, 8)
    convolve = PackedConvolution(weight, bias)
    assert_close(convolve(x), reference(x, weight, bias, False), torch.float32)
    assert not convolve._blocks


@pytest.mark.parametrize("packed", [True, False])
def test_derivatives_are_not_lost(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    convolve = PackedConvolution(weight, bias)
    x, direction = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    expected = F.conv2d(direction, weight, padding=1)
    torch.testing.assert_close(torch.func.jvp(convolve, (x,), (direction,))[1], expected)
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(convolve(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, expected)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(convolve(x), x, direction[:, :1].expand(-1, 4, -1, -1))
    assert gradient.any()


def test_a_frozen_flow_can_be_copied_and_differentiated_forwards() -> None:
    flow = Glow((3, 8, 8), 1, 2, 8)
    flow.initialize(torch.rand(8, 3, 8, 8))
    flow.eval()
    x, direction = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    expected = torch.func.jvp(flow.encode, (x,), (direction,))[1]
    with frozen(flow):
        z = flow.encode(x)
        again = copy.deepcopy(flow)
        torch.testing.assert_close(torch.func.jvp(flow.encode, (x,), (direction,))[1], expected, rtol=1e-4, atol=1e-4)
        pickle.loads(pickle.dumps(PackedConvolution(torch.randn(4, 3, 1, 1), torch.randn(4))))
    torch.testing.assert_close(again.encode(x), z)


def test_threads_share_one_convolution() -> None:
    weight, bias = torch.randn(8, 8, 3, 3), torch.randn(8)
    convolve = PackedConvolution(weight, bias)
    inputs = [torch.randn(1 + i % 3, 8, 4 + i % 5, 8) for i in range(60)]
    with ThreadPoolExecutor(4) as pool:
        for x, y in zip(inputs, pool.map(convolve, inputs), strict=True):
            assert_close(y, reference(x, weight, bias, False), torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_flows_give_the_same_for_every_batch_and_size(autocast: bool) -> None:
    flow = Glow((3, 16, 16), 2, 2, 16, coupling="conv-actnorm", backward="fast-nothing").train()
    flow.initialize(torch.rand(8, 3, 16, 16))
    flow.eval()
    x = torch.rand(5, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = flow.encode(x)
        with frozen(flow):
            bound = 2e-2 if autocast else 1e-5
            for n in (5, 1, 5, 2):
                assert (flow.encode(x[:n]) - expected[:n]).abs().max() < bound * expected.abs().max()
            large = torch.rand(1, 3, 32, 24)
            assert torch.isfinite(flow.encode(large)).all()
            assert torch.equal(flow.encode(x), flow.encode(x))
