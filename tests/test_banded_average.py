"""accumulate of dmc_fast: the banded average and the doubling spans of a CPU, and the kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dmc
import dmc_fast
from nanodmc.banded_average import BandedAverage, doubling_average
from test_dmc import (
    assert_as_good,
    kernels,
    on_cpu,
    poisoned,  # noqa: F401
    qkv,
    seeds,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny tensors

some_lengths = st.sampled_from([1, 2, 13, 32, 33, 70])
some_windows = st.sampled_from([None, 1, 2, 3, 12, 32, 33, 100])


def accumulate_inputs(seed, T, hard, G=3, D=8):
    """k, v, alpha, omega in fp64. hard: alpha in {0, 1}."""
    _, k, v, alpha, omega = qkv(seed, (G, G), T, D=D)
    if not hard:
        rng = torch.Generator().manual_seed(seed)
        alpha = torch.rand(alpha.shape, generator=rng, dtype=torch.float64)
        alpha[..., 0] = 0
    return [k, v, alpha, omega]


def check_accumulate(T, window, hard, dtype, D=8, G=2, device="cpu", average=dmc_fast.accumulate):
    """`average` against dmc.accumulate, from the same numbers, in `dtype` and in fp64.

    k, v are in `dtype`, and views of (B, T, G, D); decisions and importances in fp32, as in the
    model.
    """
    k, v, alpha, omega = (x.to(device) for x in accumulate_inputs(1, T, hard, G=G, D=D))
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    k, v = k.to(dtype).double(), v.to(dtype).double()
    alpha, omega = alpha.float().double(), omega.float().double()

    def run(f, dtype, wide):
        inputs = [k.to(dtype), v.to(dtype), alpha.to(wide), omega.to(wide)]
        return with_gradients(lambda *x: f(*x, window), inputs, None)
    assert_as_good(run(average, dtype, torch.float32), run(dmc.accumulate, dtype, torch.float32),
                   run(dmc.accumulate, torch.float64, torch.float64))


def same_with_gradients(average, exact, inputs):
    results = [with_gradients(f, inputs, torch.float64) for f in (average, exact)]
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= 1e-12 * max(1, theirs.abs().max())


@on_cpu
@given(seeds, some_lengths, some_windows, st.booleans())
def test_accumulate_and_its_gradients(seed, T, window, hard):
    same_with_gradients(lambda *x: dmc_fast.accumulate(*x, window),
                        lambda *x: dmc.accumulate(*x, window), accumulate_inputs(seed, T, hard))


@on_cpu
@given(seeds, some_lengths, some_windows, st.booleans())
def test_doubling_spans_are_eq9(seed, T, window, hard):
    same_with_gradients(lambda *x: doubling_average(*x, window),
                        lambda *x: dmc.accumulate(*x, window), accumulate_inputs(seed, T, hard))


@on_cpu
@given(seeds, some_lengths, st.sampled_from([1, 2, 12, 33, 70]), st.booleans())
def test_the_band_is_eq9(seed, T, window, hard):
    """At any width, also where accumulate takes the doubling spans instead."""
    W = min(T, window)
    same_with_gradients(lambda *x: BandedAverage.apply(*x, W),
                        lambda *x: dmc.accumulate(*x, window), accumulate_inputs(seed, T, hard))


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 12, 100, None])
def test_accumulate_is_as_precise_as_the_plain_computation(dtype, window):
    check_accumulate(70, window, False, dtype)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 12, 100, None])
def test_doubling_spans_are_as_precise_as_the_plain_computation(dtype, window):
    check_accumulate(70, window, False, dtype, average=doubling_average)


@kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype,T,window,hard,D", [
    (torch.float32, 1, 12, False, 8), (torch.float32, 2, 3, True, 8),
    (torch.float32, 13, 12, False, 8), (torch.float32, 33, 1, False, 8),
    (torch.float32, 35, 2, True, 20), (torch.float32, 33, 5, False, 64),
    (torch.float32, 9, 100, False, 8), (torch.float32, 40, 16, False, 8),
    (torch.float16, 33, 4, True, 8), (torch.float16, 70, 12, False, 24)])
def test_accumulate_kernels(dtype, T, window, hard, D):
    """In half precision with fp16, since Triton's interpreter gets bf16's dot products wrong."""
    check_accumulate(T, window, hard, dtype, D)


@kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("T,window,hard,D", [
    (1, None, True, 8), (67, None, False, 6), (40, 40, False, 8), (40, 20, False, 8),
    (40, 12, False, 8)])
def test_accumulate_kernels_without_a_gradient(T, window, hard, D):
    k, v, alpha, omega = (x.float() for x in accumulate_inputs(2, T, hard, G=2, D=D))
    alpha **= 1 / 64                                             # so that what a window cuts counts
    exact = dmc.accumulate(*(x.double() for x in (k, v, alpha, omega)), window)
    plain = dmc.accumulate(k, v, alpha, omega, window)
    fast = dmc_fast.accumulate(k, v, alpha > 0.5 if hard else alpha, omega, window)
    assert_as_good(fast, plain, exact)
