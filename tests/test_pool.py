"""Properties of nanodmc/pool.py: how many pages a cache's pool gets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmc_fast
from dmc_fast import PagedCache
from nanodmc.engine import Engine
from nanodmc.pool import PAGE, full_pages, page_bytes, pages_that_fit
from test_dmc import config_of, groups, model_of, parts, qkv, seeds

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@given(groups, st.sampled_from(DTYPES), st.integers(10, 40))
@settings(max_examples=10)
def test_a_page_takes_what_it_adds_to_a_cache(heads, dtype, pages):
    config = config_of(heads)
    fewer, more = (PagedCache(config, 1, dtype=dtype, pages=n).bytes.allocated
                   for n in (pages, pages + 8))
    assert (more - fewer) // 8 == page_bytes(config, dtype) + 4      # and its number
    assert PagedCache(config, 1).page_size == PAGE


@given(st.integers(1, 5), st.integers(0, 400), st.booleans())
def test_as_many_pages_fit_as_memory_and_rows_have_room_for(rows, pages, capped):
    """capped: the pool is never larger than all rows at full length need."""
    model = model_of(0, (4, 2), ops=dmc_fast)
    gigabytes = (pages + 0.5) * page_bytes(model.config, torch.float64) / 1e9
    needed = rows * 2 * 2 * -(-model.config.max_seq_len // PAGE)     # layers, heads
    found = pages_that_fit(model, rows, gigabytes, None, capped)
    assert found == (min(pages, needed) if capped else pages)
    assert full_pages(model.config, rows) == needed
    assert len(Engine(model, rows).cache.free) == needed         # which starts with all of it


def tokens_of(seed, T, rows=2):
    return [x.float() for x in qkv(seed, (4, 2), T, rows)]


@given(seeds, st.sampled_from([None, 3]), st.sampled_from([[40, 1, 1], [1] * 50, [3, 60]]))
@settings(max_examples=12)
def test_a_pool_grows_with_its_sequences(seed, window, portions):
    """It gives the bits of a pool that was full from the start, and its size follows the tokens."""
    config = config_of((4, 2), window, max_seq_len=128)
    growing, full = PagedCache(config, 2), PagedCache(config, 2, pages=full_pages(config, 2))
    heads, size, seen = 2 * 2 * 2, page_bytes(config, torch.float32) + 4, 0
    fixed = full.bytes.allocated - len(full.free) * size
    assert growing.bytes.allocated == fixed + heads * size       # a page for every head
    for part in parts(tokens_of(seed, sum(portions)), portions):
        y = [[cache.attend(layer, *part) for layer in range(2)] for cache in (growing, full)]
        assert all(torch.equal(a, b) for a, b in zip(*y, strict=True))
        seen += part[0].size(2)
        needed = heads * -(-seen // PAGE)
        assert needed <= len(growing.free) <= max(heads, 1.5 * needed)
        assert growing.bytes.allocated == fixed + len(growing.free) * size
    assert torch.equal(growing.lengths, full.lengths) and growing.left == len(
        growing.free) - (-(-growing.lengths // PAGE)).sum()
    growing.check()
    growing.release(slice(None))
    assert sorted(growing.free.tolist()) == list(range(1, len(growing.free) + 1))


def test_a_pool_grows_to_the_last_position_and_no_further():
    config = config_of((4, 2), n_layer=1)
    cache = PagedCache(config, 2)
    for part in parts(tokens_of(0, 64), [1] * 64):
        cache.attend(0, *part)
    assert len(cache.free) == full_pages(config, 2)
    with pytest.raises(ValueError, match="65 tokens do not fit"):
        cache.attend(0, *tokens_of(0, 1))
    cache.check()


def test_a_pool_is_full_and_fixed_once_sequences_are_admitted():
    """Else the cache of the admitted one would have a pool of its own."""
    config = config_of((4, 2), n_layer=1)
    cache = PagedCache(config, 2)
    cache.attend(0, *tokens_of(0, 5))
    cache.release(slice(0, 1))
    part = cache.admit(slice(0, 1))
    assert len(cache.free) == full_pages(config, 2) and part.pool_k is cache.pool_k
    part.attend(0, *tokens_of(1, 60, 1))
    cache.attend(0, *tokens_of(2, 1))
    assert part.free is cache.free and part.left is cache.left and part.pool_v is cache.pool_v
    cache.check()


def test_a_pool_stays_as_it_is_within_a_graph(monkeypatch):
    """A graph is replayed where the pool was when it was captured; what does not fit is told."""
    config = config_of((4, 2), n_layer=1)
    cache = PagedCache(config, 1)
    first, rest = parts(tokens_of(0, 40, 1), [1, 39])
    monkeypatch.setattr("nanodmc.pages.capturing", lambda device: True)
    cache.attend(0, *first)
    monkeypatch.undo()
    pool = cache.pool_k
    rest[3].zero_()                                              # nothing merges
    cache.attend(0, *rest)
    assert cache.pool_k is pool
    with pytest.raises(ValueError, match="2 pages are used up"):
        cache.check()


def test_without_a_limit_it_is_a_gigabyte_on_a_cpu():
    model = model_of(0)
    size = page_bytes(model.config, torch.float64)
    assert pages_that_fit(model, 10 ** 6, None, None, capped=False) == 10 ** 9 // size
    assert pages_that_fit(model, 1, 0.0, None) == 0 == pages_that_fit(model, 1, 1e-9, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_pool_of_a_gpu_leaves_room_for_the_rest_gpu():
    model = model_of(0, ops=dmc_fast).cuda()
    pages = pages_that_fit(model, 4, None, None, capped=False)
    free, total = torch.cuda.mem_get_info()
    size = pages * page_bytes(model.config, torch.float64)
    assert 0.5 * free < size < free - 0.02 * total
