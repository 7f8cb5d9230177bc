"""Properties of nanodmc/pool.py: how many pages a cache's pool gets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmc_fast
from dmc_fast import PagedCache
from nanodmc.pool import PAGE, page_bytes, pages_that_fit
from test_dmc import config_of, groups, model_of

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
    cache = PagedCache(model.config, rows, dtype=torch.float64)
    assert len(cache.free) >= needed


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
