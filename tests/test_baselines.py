"""Properties of nanodmc/baselines.py: what DMC is compared with."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmc
import dmc_fast
from nanodmc.baselines import pooling_cache
from test_dmc import (
    assert_as_good,
    assert_close,
    both,
    config_of,
    kernels,
    literal_algorithm1,
    qkv,
    seeds,
)


@both
@given(seeds, st.sampled_from([1, 2, 3, 5, 12, 13, 14]), st.integers(1, 16))
@settings(max_examples=10)
def test_pooling_averages_every_n_tokens(ops, seed, every, split):
    """All of them, however far the model's own window reaches."""
    config = config_of(dmc=False)
    q, k, v, _, _ = qkv(seed, (4, 4), T := 16)
    cache = pooling_cache(ops.Cache, every)(config, 2, dtype=torch.float64)
    parts = zip(*(x.split(split, dim=2) for x in (q, k, v)), strict=True)
    y = torch.cat([cache.attend(0, *part) for part in parts], dim=2)
    fixed = (np.arange(T) % every > 0).astype(float)
    for b, h in np.ndindex(2, 4):
        expected, slots = literal_algorithm1(
            q[b, h:h + 1].numpy(), k[b, h].numpy(), v[b, h].numpy(), fixed, np.ones(T), None,
            config.rope_theta, silent=False)
        assert_close(y[b, h:h + 1], torch.from_numpy(expected))
        assert cache.lengths[0, b, h] == slots == math.ceil(T / every)


@kernels
@pytest.mark.parametrize("heads,every", [((4, 2), 3), ((2, 2), 13)])
def test_pooling_a_prompt_kernel(heads, every):
    """A plain model's channel 0 counts, where a DMC model's would carry the mask."""
    q, k, v, _, _ = qkv(0, heads, 20)
    inputs, config = [x.float() for x in (q, k, v)], config_of(heads, dmc=False)
    outputs = []
    for ops, dtype in ((dmc_fast, torch.float32), (dmc, torch.float32), (dmc, torch.float64)):
        cache = pooling_cache(ops.Cache, every)(config, 2, dtype=dtype)
        outputs.append([cache.attend(0, *(x[:, :, a:b].to(dtype) for x in inputs))
                        for a, b in ((0, 19), (19, 20))])
    assert_as_good(*outputs)


def test_a_pooling_cache_is_a_cache_in_all_else():
    """What evaluation and generation read of a cache is there, and is that of its own tokens."""
    config = config_of(dmc=False, window=None)
    q, k, v, _, _ = qkv(0, (4, 4), 12)
    cache = pooling_cache(dmc.Cache, 3)(config, 2, dtype=torch.float64)
    for layer in range(config.n_layer):
        cache.attend(layer, q, k, v)
    assert cache.seen == [12, 12] and cache.compression_ratio == 3
    assert (cache.gain, cache.dtype, cache.config) == (1.0, torch.float64, config)
