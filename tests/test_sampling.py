"""Properties of nanodmc/sampling.py: from logits to a token, and a text from one prompt."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc import Cache
from nanodmc import sampling
from nanodmc.files import InputError
from test_dmc import assert_close, groups, lengths, model_of, seeds


def greedily(logits, position):
    return logits.argmax().item()


@given(seeds, groups, lengths)
@settings(max_examples=10)
def test_the_next_logits_are_the_last_of_all(seed, heads, T):
    """With a cache, without one, and with a gain."""
    model = model_of(seed, heads)
    tokens = torch.randint(0, 29, (2, T))
    for gain in (None, 0.0):
        expected = model(tokens, gain=gain)[0][:, -1]
        assert_close(sampling.next_logits(model, tokens, None, gain), expected, 1e-12)
        cache = Cache(model.config, 2, dtype=torch.float64)
        assert_close(sampling.next_logits(model, tokens, cache, gain), expected)
        assert cache.seen[0] == T


@given(seeds, st.integers(1, 12))
@settings(max_examples=10)
def test_greedy_generation_is_the_parallel_argmax(seed, count):
    """Each token from the cache is the likeliest one of a parallel pass over all before it."""
    model = model_of(seed, (8, 2))
    prompt = torch.randint(0, 29, (5,)).tolist()
    cache = Cache(model.config, 1, dtype=torch.float64)
    ids = list(sampling.generate(model, cache, prompt, count, greedily))
    everything = prompt + ids
    assert len(ids) == count
    assert model(torch.tensor([everything]))[0][0, 4:-1].argmax(-1).tolist() == ids
    assert cache.seen[0] == len(everything) - 1


def test_generation_stops_before_the_end_of_text():
    model = model_of(0)
    eos = model(torch.tensor([[1, 2]]))[0][0, -1].argmax().item()
    cache = Cache(model.config, 1, dtype=torch.float64)
    assert list(sampling.generate(model, cache, [1, 2], 5, greedily, stops=[eos])) == []


def test_sampling_filters():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])

    def ids(n=2000, **changes):
        values = dict(temperature=1.0, top_k=0, top_p=1.0, seed=0) | changes
        columns = [torch.full((n,), values[name], dtype=dtype)
                   for name, dtype in sampling.SETTINGS.items()]
        return sampling.sample(logits.repeat(n, 1), *columns, torch.arange(n)).tolist()

    draw = lambda **changes: set(ids(**changes))
    assert draw() == {0, 1, 2, 3}
    assert draw(top_k=2) == {1, 2} and draw(top_k=1) == {1} and draw(temperature=0) == {1}
    p = logits.softmax(-1)
    assert draw(top_p=p[1].item() - 1e-6) == {1} and draw(top_p=0.0) == {1}
    assert draw(top_p=p[1].item() + 1e-6) == {1, 2}
    for temperature in (1.0, 2.0):
        p, drawn = (logits / temperature).softmax(-1), ids(4000, temperature=temperature)
        for i in range(4):
            spread = math.sqrt(p[i] * (1 - p[i]) / 4000)
            assert abs(drawn.count(i) / 4000 - p[i]) < 5 * spread


def literal_distribution(logits, temperature, top_k, top_p):
    """The tokens that may fall, in the order of ids, and their probabilities: {id: probability}."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k or None]
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in order]
    kept, reached = {}, 0.0
    for i, weight in zip(order, weights, strict=True):
        if kept and reached >= top_p:
            break
        kept[i] = weight / sum(weights)
        reached += kept[i]
    return {i: kept[i] / reached for i in sorted(kept)}


@given(seeds, st.integers(0, 10), st.floats(0.0, 1.0, allow_subnormal=False),
       st.sampled_from([0.1, 1.0, 3.0]), st.integers(0, 2 ** 62))
def test_a_batch_is_sampled_as_its_rows_are(seed, top_k, top_p, temperature, first):
    """Every row gets the token at which its own uniform number lies in its own distribution,
    whatever the other rows do. Rounded logits have ties."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 9, generator=rng).mul(3).round()
    logits[7, 3] = torch.nan
    values = zip((temperature, top_k, top_p, 0), sampling.SETTINGS.values(), strict=True)
    columns = [torch.full((40,), x, dtype=dtype) for x, dtype in values]
    columns[0][::4] = 0
    columns[3] += first + torch.arange(40)
    position = torch.arange(40) % 3
    ids = sampling.sample(logits, *columns, position).tolist()
    u = sampling.uniform(columns[3], position).tolist()
    for i, row in enumerate(logits.tolist()):
        p = {row.index(max(row)): 1.0}
        if i % 4:
            p = literal_distribution(row, temperature, top_k, top_p)
        below = {token: sum(list(p.values())[:n]) for n, token in enumerate(p)}
        if i == 7:
            assert ids[i] == -1
        else:
            assert ids[i] in p
            assert below[ids[i]] - 1e-9 <= u[i] <= below[ids[i]] + p[ids[i]] + 1e-9
        alone = [x[i:i + 1] for x in (logits, *columns, position)]
        for limits in (None, (top_k, top_p < 1), (16, True)):
            assert ids[i] == sampling.sample(*alone, limits).item()
    with pytest.raises(InputError, match="not numbers"):
        sampling.chooser(temperature=1.0, top_k=0, top_p=1.0, seed=0)(logits[7], 1)


@given(seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_keys_are_in_the_order_of_the_logits(seed, dtype):
    torch.manual_seed(seed)
    x = torch.cat([torch.randn(40) * 10.0 ** torch.randint(-35, 38, (40,)), torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf])]).to(dtype)
    key, bits = sampling.rising(x)
    assert torch.equal(key[:, None] < key, x[:, None] < x)
    assert ((-2 ** (bits - 1) <= key.long()) & (key.long() < 2 ** (bits - 1))).all()


@given(seeds, st.sampled_from([torch.float32, torch.bfloat16]), st.floats(0.01, 1.0))
def test_a_threshold_is_that_of_a_sort(seed, dtype, goal):
    torch.manual_seed(seed)
    x = (4 * torch.randn(5, 50)).to(dtype)
    p, goal = x.double().softmax(-1), torch.full((5, 1), goal, dtype=torch.float64)
    key, bits = sampling.rising(x)
    kept = sampling.reaching(key, sampling.threshold(key, bits, p, goal), p, goal)
    ordered, ids = x.sort(descending=True, stable=True)
    sums = p.gather(-1, ids).cumsum(-1)
    count = (sums < goal - 1e-12).sum(-1, keepdim=True) + 1
    rank = ids.argsort(-1)
    assert torch.equal(kept, rank < count)


def test_random_numbers_are_uniform_and_independent():
    """Over all seeds and positions, and between neighbours in either: the means, the spread and
    the correlations of independent numbers."""
    u = sampling.uniform(torch.arange(400)[:, None], torch.arange(400)[None])
    assert u.min() >= 0 and u.max() < 1 and u.unique().numel() == u.numel()
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - u.numel() / 20).abs() < 5 * math.sqrt(u.numel() / 20)).all()
    z = (u - 0.5) * math.sqrt(12)
    swapped = (z.T * z)[torch.ones(400, 400).triu(1) > 0]
    for product in (z[1:] * z[:-1], z[:, 1:] * z[:, :-1], z[1:, 1:] * z[:-1, :-1],
                    z[1:, :-1] * z[:-1, 1:], swapped):
        assert abs(product.sum()) < 5 * math.sqrt(product.numel())


def test_derived_seeds_are_seeds_of_their_own():
    """In the range of --seed; no two of many are equal, and their draws are not those of the seed
    they follow from, nor of one another at other positions."""
    given = 0, 1, 2 ** 62
    seeds = [sampling.derived_seed(seed, number) for seed in given for number in range(1, 99)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed <= 2 ** 62 for seed in seeds)
    assert seeds[:3] == [sampling.derived_seed(0, number) for number in (1, 2, 3)]
    u = sampling.uniform(torch.tensor([*given, *seeds])[:, None], torch.arange(50)[None])
    assert u.unique().numel() == u.numel()


@given(seeds, st.sampled_from([torch.float32, torch.float16]))
@settings(max_examples=20)
def test_a_row_that_is_not_numbers_fails_alone(seed, dtype):
    """Also one that is infinite gets a token or -1, and all others get theirs."""
    torch.manual_seed(seed)
    logits, rows = 4 * torch.randn(6, 29).to(dtype), torch.arange(6)
    how = torch.tensor([0, 1.0] * 3), rows, 0.9 * torch.ones(6), rows
    expected = sampling.sample(logits, *how, rows)
    logits[1], logits[2], logits[3, 5], logits[4, 5:] = torch.nan, -torch.inf, torch.inf, torch.nan
    tokens = sampling.sample(logits, *how, rows)
    assert tokens[[1, 4]].tolist() == [-1, -1] == sampling.likeliest(logits)[[1, 4]].tolist()
    assert torch.equal(tokens[[0, 5]], expected[[0, 5]]) and tokens[3] == 5
    assert ((tokens >= -1) & (tokens < 29)).all()
