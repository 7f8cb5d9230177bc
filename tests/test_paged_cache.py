"""The decode step over pages, the kernels that attend; what caches count, and what they refuse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmc
import dmc_fast
from nanodmc.launch import INTERPRETED
from nanodmc.work_list import BLOCK, work_list
from test_dmc import (
    assert_as_good,
    config_of,
    kernels,
    lengths,
    model_of,
    on_cpu,
    parts,
    poisoned,  # noqa: F401
    qkv,
    seeds,
)

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny tensors


def paged(lengths, page, D, dtype):
    """Random keys and values of rows with so many slots: pools (pages + 1, page, D), and the table.

    No page is where one would expect it, and what is not in use is NaN.
    """
    pages, rng = -(-lengths // page), torch.Generator(lengths.device).manual_seed(0)
    total, device = int(pages.sum()), lengths.device
    nth = torch.arange(int(pages.max()) + 1, device=device)
    order = torch.randperm(total, generator=rng, device=device).int()
    at = (pages.cumsum(0) - pages)[:, None] + nth
    table = torch.where(nth < pages[:, None], order[at.clamp(max=total - 1)], total)
    pools = [torch.randn(total + 1, page, D, generator=rng, device=device, dtype=dtype)
             for _ in range(2)]
    last = table.gather(1, (pages[:, None] - 1).clamp(min=0).long())[:, 0]
    slots = ((pages - 1) * page)[:, None] + torch.arange(page, device=device)    # of the last page
    unused = (slots >= lengths[:, None])[..., None]
    for pool in pools:
        pool[last] = torch.where(unused, torch.nan, pool[last])
        pool[total] = torch.nan
    return *pools, table


def check_decode(lengths, R, D, page, extra, dtype, earlier=None):
    """Against padded attention, twice, which must give the same bits.

    extra: programs beside one for each row. earlier: lengths of which the list of work is.
    """
    lengths, device = lengths.int(), lengths.device
    pool_k, pool_v, table = paged(lengths, page, D, dtype)
    rng = torch.Generator(device).manual_seed(1)
    q = torch.randn(len(lengths), R, D, generator=rng, device=device).to(dtype)
    used = torch.arange(table.size(1) * page, device=device) < lengths[:, None]
    plain, exact = [], []
    for wide, out in ((dtype, plain), (torch.float64, exact)):
        k, v = (pool[table].flatten(1, 2).to(wide).nan_to_num() for pool in (pool_k, pool_v))
        scores = (q.to(wide) @ k.mT / D ** 0.5).masked_fill(~used[:, None], -torch.inf)
        out.append(scores.softmax(-1).nan_to_num() @ v)
    known = lengths if earlier is None else earlier.to(device)
    items, places = (x[0] for x in work_list(known[None], extra))
    results = [dmc_fast.decode(q, pool_k, pool_v, table, lengths, items, places) for _ in range(2)]
    assert_as_good(results[:1], plain, exact)
    assert torch.equal(*results) and (results[0][lengths == 0] == 0).all()


@kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("R,D,page,extra,dtype", [
    (1, 128, 16, 1, torch.float32), (3, 64, 32, 7, torch.float32), (4, 64, 16, 3, torch.float16),
    (8, 64, 64, 1, torch.float16)])
def test_ragged_decode_kernel(R, D, page, extra, dtype):
    """In fp16 for want of bf16, whose products the interpreter gets wrong."""
    ragged = torch.tensor([0, 1, page - 1, page, page + 1, 3 * page + 5, 200])
    check_decode(ragged, R, D, page, extra, dtype)
    check_decode(ragged, R, D, page, extra, dtype, earlier=ragged.flip(0))


@on_cpu
@given(st.lists(st.lists(st.integers(0, 5000), min_size=7, max_size=7), min_size=1, max_size=3),
       st.integers(1, 40))
def test_a_work_list_has_every_split_once_and_evenly(lengths, extra):
    lengths = torch.tensor(lengths)
    items, places = work_list(lengths, extra)
    assert items.shape == (len(lengths), 3, 7 + extra) and places.shape == (len(lengths), 2, 7)
    for layer in range(len(lengths)):
        blocks = -(-lengths[layer] // BLOCK)
        most = max(1, -(-int(blocks.sum()) // extra))
        listed = [tuple(item) for item in items[layer].T.tolist()]
        real = [item for item in listed if item[2]]
        assert listed[len(real):] == [item for item in listed if not item[2]]
        for row in range(7):
            first, splits = places[layer, :, row].tolist()
            assert splits == max(1, -(-int(blocks[row]) // most))
            assert real[first:first + splits] == [(row, i, splits) for i in range(splits)]
        sizes = [float(blocks[row]) / splits for row, _, splits in real]
        assert len(real) == places[layer, 1].sum() and sizes == sorted(sizes, reverse=True)
        assert max(sizes) <= most


@on_cpu
@pytest.mark.parametrize("name,rows,slots", [
    ("CR 8, batch 8", 8 * 32, 384), ("CR 8, batch 16", 16 * 32, 384),
    ("8 grouped heads, CR 1, batch 64", 64 * 8, 3072)])
def test_the_programs_of_a_decode_step_end_together(name, rows, slots, measured):
    """Of heads whose lengths spread as those of a retrofitted model, on the 132 SMs of an H100."""
    spread = 0.0 if "CR 1" in name else 0.7
    lengths = (torch.randn(rows, generator=torch.Generator().manual_seed(0)) * spread).exp()
    lengths = (lengths / lengths.mean() * slots).int()
    blocks, extra = -(-lengths // BLOCK), 4 * 132
    before = max(1, min(16, extra // rows))
    items, places = work_list(lengths[None], extra)
    mean = blocks.sum().item() / 132 / 4                # of the programs that run at once
    longest = (blocks / places[0, 1]).ceil().max().item()
    measured[name] = {"blocks of 64 slots per program": mean, "longest program": longest,
                      "longest with equally many splits for each head":
                          (blocks / before).ceil().max().item()}
    assert longest <= max(1, math.ceil(mean))


# ---------------------------------------------------------------------------- what both caches have

@on_cpu
@given(seeds, lengths)
def test_cache_counts_slots_and_bytes(seed, T):
    config = config_of((8, 2), n_layer=1)
    q, k, v, alpha, omega = (x.float() for x in qkv(seed, (8, 2), T))
    cache = dmc_fast.PaddedCache(config, 2)
    assert cache.compression_ratio == 1.0 and cache.bytes.used == 0
    cache.attend(0, q, k, v, alpha, omega)
    slots = (1 - alpha).sum().item()
    assert cache.compression_ratio == pytest.approx(alpha.numel() / slots)
    assert cache.bytes.used == slots * 2 * 8 * 4
    longest = (1 - alpha).sum(-1).max().item() if T > 1 else 32      # one token makes room for more
    state = 2 * 2 * 12 * (2 * 8 + 1) * 4       # k, v, omega of the last 12 tokens, B = G = 2
    assert cache.bytes.allocated == 2 * 2 * longest * 2 * 8 * 4 + state
    for _ in range(5):
        cache.attend(0, *(x[:, :, -1:] for x in (q, k, v, alpha, omega)))
    assert cache.bytes.used <= cache.bytes.allocated - state


@on_cpu
@pytest.mark.parametrize("ops", [dmc, dmc_fast])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_cache_is_made_from_its_model(ops, dtype):
    model, tokens = model_of(0, (4, 2), ops=ops).to(dtype), torch.arange(12).view(2, 6)
    cache = model.new_cache(2)
    with torch.no_grad():
        for part in tokens.split([3, 1, 1, 1], dim=1):
            logits = model(part, cache)[0]
    assert logits.dtype == dtype == cache.dtype and cache.lengths.shape == (2, 2, 2)
    assert cache.seen == [6, 6]


@on_cpu
def test_a_cache_is_paged_where_pages_are_asked_for():
    assert isinstance(dmc_fast.Cache(config_of(), 1), dmc_fast.PaddedCache)
    cache = dmc_fast.Cache(config_of(), 1, page_size=32, pages=9)
    assert isinstance(cache, dmc_fast.PagedCache)
    assert cache.page_size == 32 and len(cache.free) == 9
    fixed = sum(x.nbytes for x in (cache.table, *cache.open.tensors()))
    pool = 2 * (9 + 1) * 32 * 8 * 4            # k and v, 9 pages and the spare one, 8 channels
    assert cache.bytes.allocated == pool + 9 * 4 + fixed and cache.bytes.used == 0


@on_cpu
@pytest.mark.parametrize("make", [dmc_fast.PaddedCache, dmc_fast.PagedCache])
def test_what_a_cache_refuses(make):
    q, k, v, alpha, omega = (x.float() for x in qkv(0, (4, 4), 70))
    short = [x[:, :, :10] for x in (q, k, v)]
    cache = make(config_of(), 2)
    with pytest.raises(ValueError, match="70 tokens do not fit the model's 64 positions"):
        cache.attend(0, q, k, v, alpha, omega)
    cache.attend(0, *short)
    with pytest.raises(ValueError, match="in every call or in none"):
        cache.attend(0, *short, alpha[..., :10], omega[..., :10])
    with pytest.raises(ValueError, match="80 tokens do not fit"):
        cache.attend(0, q, k, v)


@pytest.mark.parametrize("size", [0, 8, 48, 128])
def test_pages_of_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"page_size is {size}; choose 16, 32 or 64"):
        dmc_fast.PagedCache(config_of(), 1, page_size=size)


@pytest.mark.parametrize("window, kernels", [(None, True), (12, True), (64, True), (65, False)])
def test_a_window_that_a_warp_cannot_hold_goes_without_kernels(monkeypatch, window, kernels):
    monkeypatch.setattr("nanodmc.pages.uses_kernels", lambda device: True)
    assert dmc_fast.PagedCache(config_of(window=window), 1).kernels == kernels


# ------------------------------------------------------ what is wrong with one sequence stays there

BAD = [torch.nan, torch.inf, -torch.inf, 1e38]


def poison(inputs, row, bad, at=slice(None)):
    """inputs, with `bad` in a channel of the keys, values and queries of one sequence."""
    inputs = [x.clone() for x in inputs]
    for x in inputs[:3]:
        x[row, :, at, 3] = bad
    return inputs


@settings(max_examples=3 if INTERPRETED else 40)
@given(st.data())
def test_healthy_sequences_beside_poisoned_ones_kernel(data):
    """Each gets what it gets alone, in one prefill and in steps, from every kind of cache."""
    window, seed = data.draw(st.sampled_from([None, 3, 12, 40])), data.draw(seeds)
    bad, row = data.draw(st.sampled_from(BAD)), data.draw(st.integers(0, 2))
    config, T = config_of((2, 2), window, n_layer=1), 5 if INTERPRETED else 34
    inputs = [x.float() for x in qkv(seed, (2, 2), T, B=3)]
    sick = poison(inputs, row, bad, data.draw(st.sampled_from([slice(None), 0, T // 2, T - 2])))
    healthy = [i for i in range(3) if i != row]
    portions = data.draw(st.sampled_from([[1] * T, [T - 2, 1, 1]]))
    makes = [dmc_fast.PagedCache] if INTERPRETED else [dmc_fast.PagedCache, dmc_fast.PaddedCache]
    for make in makes:
        cache, references = make(config, 3), [dmc.Cache(config, 1) for _ in range(3)]
        for part in parts(sick, portions):
            y = cache.attend(0, *part)
            for i in healthy:
                expected = references[i].attend(0, *(x[i:i + 1] for x in part))
                assert (y[i:i + 1] - expected).abs().max() < 1e-5


def test_a_released_row_beside_a_first_token_kernel():
    """Where all pages are free, and the row before takes none."""
    tokens = [x.float() for x in qkv(0, (2, 1), 1)]
    cache = dmc_fast.PagedCache(config_of((2, 1), n_layer=1), 2, pages=8)
    cache.release([0])
    y = cache.attend(0, *tokens)
    expected = dmc.Cache(cache.config, 1).attend(0, *(x[1:] for x in tokens))
    assert (y[1:] - expected).abs().max() < 1e-5 and not y[0].any()
    assert cache.left.item() == 7 and cache.lengths.flatten().tolist() == [0, 1]


@settings(max_examples=3 if INTERPRETED else 40)
@given(st.data())
def test_sequences_in_a_poisoned_ones_place_kernel(data):
    """They know nothing of its pages, its ring, and what it wrote when released."""
    window, bad = data.draw(st.sampled_from([None, 3, 12])), data.draw(st.sampled_from(BAD))
    n = 3 if INTERPRETED else 20
    config = config_of((2, 1), window, n_layer=1, max_seq_len=128)
    tokens = [x.float() for x in qkv(data.draw(seeds), (2, 1), 4 * n, B=2)]
    tokens[3][..., 0] = tokens[3][..., 2 * n] = 0                # what is admitted appends
    short = data.draw(st.sampled_from([2, n]))
    cache = dmc_fast.PagedCache(config, 2, pages=12)
    cache.release(slice(None))
    portion = lambda first, count, rows=slice(None): [x[rows, :, first:first + count]
                                                      for x in tokens]

    def admit(row, part):
        references[row] = dmc.Cache(config, 1)
        y, expected = (c.attend(0, *part) for c in (cache.admit(slice(row, row + 1)),
                                                    references[row]))
        return y, expected

    def steps(first, count, sick=None):
        for t in range(first, first + count):
            part = portion(t, 1)
            part = part if sick is None else poison(part, sick, bad)
            y = cache.attend(0, *part)
            for i in {0, 1} - {sick}:
                expected = references[i].attend(0, *(x[i:i + 1] for x in part))
                assert (y[i:i + 1] - expected).abs().max() < 1e-5

    references = {}
    admit(1, poison(portion(0, n, slice(1, 2)), 0, bad))
    y, expected = admit(0, portion(0, n, slice(0, 1)))
    assert (y - expected).abs().max() < 1e-5
    steps(n, n, sick=1)
    cache.release(slice(1, 2))
    part = poison(portion(2 * n, 1), 1, bad)                     # a released row has inputs, too
    y = cache.attend(0, *part)[:1]
    assert (y - references[0].attend(0, *(x[:1] for x in part))).abs().max() < 1e-5
    y, expected = admit(1, portion(2 * n, short, slice(1, 2)))
    assert (y - expected).abs().max() < 1e-5
    steps(3 * n, n)
    cache.release(slice(0, 1))                                   # the sick one gets its pages
    cache.release(slice(1, 2))
    admit(1, poison(portion(0, 4 * n, slice(1, 2)), 0, bad))
    y, expected = admit(0, portion(2 * n, short, slice(0, 1)))
    assert (y - expected).abs().max() < 1e-5
    steps(3 * n, n, sick=1)
    cache.release(slice(None))
    cache.check()
    assert cache.kernels or not any(pool.any() for pool in (cache.pool_k, cache.pool_v))
