"""Attention for large scores: it is dmc.attend, and known where it is needed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dmc
from nanodmc.large_scores import LIMIT, attend_in_blocks, too_large
from test_dmc import groups, on_cpu, seeds, with_gradients
from test_flash_attention import attend_inputs

pytestmark = [on_cpu, pytest.mark.usefixtures("one_thread")]


@given(seeds, groups, st.sampled_from([1, 15, 16, 17, 40]), st.booleans())
def test_blocks_of_queries_are_the_plain_computation(seed, heads, T, hard):
    inputs = attend_inputs(seed, heads, T, hard, silent=False)
    blocks = lambda *x: attend_in_blocks(*x, rows=16)
    results = [with_gradients(f, inputs, torch.float64) for f in (blocks, dmc.attend)]
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() < 1e-12


@given(seeds, groups, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_no_large_score_is_missed(seed, heads, dtype):
    """And scores that are usual in a model are not taken for large ones."""
    q, k, _, _ = attend_inputs(seed, heads, 9, hard=True, silent=True)
    assert not too_large(q.to(dtype), k.to(dtype)).any()
    scores = q[0].unflatten(0, (heads[1], -1)) @ k[0, :, None].mT / 8 ** 0.5
    q[0] *= 1.01 * LIMIT / scores.abs().max()
    assert too_large(q, k).tolist() == [True, False]
    for bad in (torch.nan, torch.inf, -torch.inf):
        k[1, 0, 3, 2] = bad
        assert too_large(q.to(dtype), k.to(dtype))[1]
