"""attend of dmc_fast, through stock flash attention: gradients, precision, kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import dmc
from nanodmc import flash_attention
from test_dmc import (
    assert_as_good,
    groups,
    kernels,
    on_cpu,
    poisoned,  # noqa: F401
    qkv,
    seeds,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny tensors


def attend_inputs(seed, heads, T, hard, silent, D=8):
    """q, k, v, keep in fp64. hard: alpha in {0, 1}; silent: the control channels are 0."""
    q, k, v, alpha, omega = qkv(seed, heads, T, D=D)
    if silent:
        q[..., 0] = k[..., 0] = 0
    alpha = alpha if hard else omega.clamp(max=0.999)
    return q, k, v, torch.log1p(-alpha * (torch.arange(T) > 0))


def check_attend(heads, T, hard, dtype, D, device="cpu"):
    """attend against dmc.attend, from the same numbers, in `dtype` and in fp64.

    q, k, v are views of (B, T, heads, D), as the projections leave them; keep is in fp32, as in
    the model. keep's gradient arrives in a channel of k, with no more than k's precision.
    """
    *inputs, keep = (x.to(device) for x in attend_inputs(0, heads, T, hard, True, D=D))
    inputs = [x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]

    def run(f, dtype, wide):
        mine = [*(x.to(dtype) for x in inputs), keep.float().to(wide)]
        *rest, dkeep = with_gradients(f, mine, None)
        return [*rest, dkeep.to(dtype)]
    assert_as_good(run(flash_attention.attend, dtype, torch.float32),
                   run(dmc.attend, dtype, torch.float32),
                   run(dmc.attend, torch.float64, torch.float64))


@on_cpu
@given(seeds, groups, st.sampled_from([1, 2, 3, 17, 70]), st.booleans(), st.booleans())
def test_attend_and_its_gradients(seed, heads, T, hard, silent):
    inputs = attend_inputs(seed, heads, T, hard, silent)
    results = [with_gradients(f, inputs, torch.float64)
               for f in (flash_attention.attend, dmc.attend)]
    for fast, exact in zip(*results, strict=True):
        assert (fast - exact).abs().max() < 1e-12


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,hard", [((4, 4), True), ((4, 4), False), ((8, 2), False)])
def test_attend_is_as_precise_as_the_plain_computation(dtype, heads, hard):
    check_attend(heads, 130, hard, dtype, 64)


@kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("heads,T,hard,D", [
    ((2, 2), 1, True, 8), ((3, 1), 2, False, 8), ((8, 2), 33, True, 20), ((8, 1), 40, False, 16),
    ((2, 2), 65, False, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_kernels(heads, T, hard, D, dtype):
    check_attend(heads, T, hard, dtype, D)


@on_cpu
@pytest.mark.parametrize("kind", ["flash", "cudnn"])
def test_stock_kernels_of_a_gpu_take_what_they_are_given(kind):
    """Without a GPU: the arguments fit PyTorch's CUDA operators, and the results have the shapes
    that the CPU's have."""
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.zeros(2, n, 16, 64, device="cuda", dtype=torch.bfloat16)
                   for n in (8, 2, 2))
        y, lse, tensors, sizes = flash_attention.flash(kind, q, k, v, 0.125)
        grads = flash_attention.flash_backward(kind, y, q, k, v, y, lse, tensors, sizes, 0.125)
    assert lse.shape == (2, 8, 16) and lse.dtype == torch.float32
    for result, like in zip((y, *grads), (q, q, k, v), strict=True):
        assert result.shape == like.shape and result.dtype == like.dtype


@on_cpu
def test_attend_without_decisions_is_plain():
    q, k, v = qkv(0, (8, 2), 9)[:3]
    assert torch.equal(flash_attention.attend(q, k, v), dmc.attend(q, k, v))
