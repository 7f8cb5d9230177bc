"""Properties of nanodmc/strips.py: where slots lie, and that memory is lent and given back."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dmc_fast
from nanodmc import strips
from nanodmc.padded_cache import attend_used
from nanodmc.pool import full_pages
from nanodmc.strips import Strips
from test_dmc import assert_close, config_of, groups, seeds

pytestmark = pytest.mark.usefixtures("one_thread")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def drawn(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@given(seeds, groups, st.integers(1, 4), st.booleans())
def test_attention_is_that_over_padded_slots(seed, heads, B, alike):
    (H, G), S, D = heads, 11, 4
    held = Strips(2, B, G, S, D, dtype=torch.float64)
    k, v, q = (drawn(seed + i, B, n, m, D) for i, (n, m) in enumerate([(G, S), (G, S), (H, 1)]))
    lengths = torch.randint(1, S + 1, (B, G), generator=torch.Generator().manual_seed(seed))
    if alike:
        lengths[:] = S - 2
    slot = torch.arange(S).expand(B, G, S)
    held.write(1, slot, slot < lengths[..., None], k, v)
    assert not held.keys[0].any() and not held.keys[1][slot >= lengths[..., None]].any()
    assert_close(held.attend(1, q, lengths), attend_used(q, k, v, lengths))


@pytest.mark.parametrize("returns", [strips.RETURNS, False])
@given(st.integers(1, 3), st.sampled_from([3, 5, 64, 1000]), st.sampled_from([2, 3, 64]),
       st.integers(0, 2))
def test_what_is_forgotten_is_zero_and_nothing_else(returns, G, S, D, row):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "RETURNS", returns)
        held = Strips(2, 3, G, S, D, dtype=torch.float32)
        lengths = torch.full((2, 3, G), S)
        lengths[:, :, 0] = S // 2
        slot = torch.arange(S).expand(3, G, S)
        k = drawn(0, 3, G, S, D, dtype=torch.float32)
        for layer in range(2):
            held.write(layer, slot, slot < lengths[layer, ..., None], k, -k)
        before = held.keys.clone(), held.values.clone()
        for rows in (slice(row, row + 1), [row], row):
            held.forget(rows, lengths)
            for old, now in zip(before, (held.keys, held.values), strict=True):
                assert not now[:, row].any()
                others = [i for i in range(3) if i != row]
                assert torch.equal(old[:, others], now[:, others])


@linux
def test_only_what_is_written_takes_memory_and_it_is_given_back():
    start = resident()
    held = Strips(2, 4, 8, 2 ** 16, 256, dtype=torch.float32)          # 2 x 4.3 GB of addresses
    assert resident() - start < 10e6
    slot = torch.arange(4096).expand(4, 8, 4096)
    k = torch.ones(4, 8, 4096, 256)                                     # 134 MB
    with_k = resident()
    held.write(0, slot, torch.ones_like(slot, dtype=torch.bool), k, k)
    assert 0.9 * 2 * k.nbytes < resident() - with_k < 1.3 * 2 * k.nbytes
    lengths = torch.zeros(2, 4, 8, dtype=torch.int32)
    lengths[0] = 4096
    held.forget(slice(0, 2), lengths)
    assert resident() - with_k < 1.3 * k.nbytes
    held.forget(slice(None), lengths)
    assert resident() - with_k < 0.1 * k.nbytes


@given(seeds, groups, st.sampled_from([None, 12, 3]))
def test_a_cache_in_strips_is_a_cache_in_pages(seed, heads, window):
    config = config_of(heads, window)
    made = [dmc_fast.PagedCache(config, 3, dtype=torch.float64, pages=full_pages(config, 3),
                                strips=strips) for strips in (False, True)]
    for cache in made:
        cache.release(slice(None))
    assert made[0].strips is None and made[1].strips.keys.size(3) == config.max_seq_len
    (H, G), D = heads, config.head_dim
    draw = torch.Generator().manual_seed(seed)

    def same(rows, layer, T, *caches):
        q, k, v = (torch.randn(rows, n, T, D, generator=draw, dtype=torch.float64)
                   for n in (H, G, G))
        alpha = (torch.rand(rows, G, T, generator=draw) < 0.5).double()
        omega = torch.rand(rows, G, T, generator=draw).double() + 0.1
        ours, theirs = (cache.attend(layer, q, k, v, alpha, omega) for cache in caches)
        assert_close(ours, theirs)

    for row, T in ((1, 7), (0, 1), (2, 4)):
        parts = [cache.admit(slice(row, row + 1)) for cache in made]
        for layer in range(config.n_layer):
            same(1, layer, T, *parts)
        if row == 0:                                    # it is done, and another comes
            for cache in made:
                cache.release(slice(1, 2))
    for _ in range(4):
        for layer in range(config.n_layer):
            same(3, layer, 1, *made)
    assert torch.equal(made[0].lengths, made[1].lengths)
    assert torch.equal(made[0].left, made[1].left) and made[0].bytes == made[1].bytes
