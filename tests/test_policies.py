"""Properties of nanodmc/policies.py: each policy keeps what a list of tokens would."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import HERE
from dmc import Cache
from nanodmc.files import InputError
from nanodmc.policies import POLICIES, EvictingCache, budget, policy_cache
from nanodmc.sampling import generate
from test_dmc import assert_close, config_of, groups, literal_rotate, model_of, qkv, seeds

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny models
names = st.sampled_from(["h2o", "tova", "window", "sinks"])
budgets = st.sampled_from([1, 2, 3, 4, 5, 6, 9, 40])
portions = st.lists(st.integers(1, 12), min_size=1, max_size=4)


# --------------------------------------------------------------- a list of tokens for each head

def dropped(name, lists, weights, slots):
    """Which entry of each list is too much. lists: of each head, (position, votes) of its tokens.

    weights (G, R, n): of the current query, which is the last in time.
    """
    if name == "tova":
        means = weights.mean((0, 1))
        return [int(np.argmin(means))] * len(lists)
    victims = []
    for tokens in lists:
        by_age = range(len(tokens))                         # the lists are in the order of time
        if name == "window":
            victims.append(0)
        elif name == "sinks":
            victims.append(next(i for i in by_age if tokens[i]["at"] >= min(4, slots - 1)))
        else:
            older = by_age[:len(tokens) - math.ceil(slots / 2)]
            victims.append(min(older, key=lambda i, tokens=tokens: tokens[i]["votes"]))
    return victims


def literal_policy(name, q, k, v, slots, theta):
    """Outputs (H, T, D) of one sequence, and of each head the positions that it ends with.

    q (H, T, D); k, v (G, T, D), not rotated; numpy, fp64.
    """
    G, T, D = k.shape
    group, lists, out = len(q) // G, [[] for _ in range(G)], np.zeros_like(q)
    for t in range(T):
        weights = np.zeros((G, group, min(t, slots) + 1))
        for g, tokens in enumerate(lists):
            tokens.append({"at": t, "votes": 0.0, "k": literal_rotate(k[g, t], t, theta),
                           "v": v[g, t]})
            for r in range(group):
                query = literal_rotate(q[g * group + r, t], t, theta)
                scores = np.array([query @ token["k"] for token in tokens]) / math.sqrt(D)
                share = np.exp(scores - scores.max())
                weights[g, r] = share / share.sum()
                out[g * group + r, t] = weights[g, r] @ np.array([x["v"] for x in tokens])
            for token, vote in zip(tokens, weights[g].mean(0), strict=True):
                token["votes"] += vote
        if len(lists[0]) > slots:
            for tokens, i in zip(lists, dropped(name, lists, weights, slots), strict=True):
                tokens.pop(i)
    return out, [[token["at"] for token in tokens] for tokens in lists]


def taken_in(cache, q, k, v, sizes):
    """The outputs of a text that layer 0 takes in by portions of these sizes, again and again."""
    outputs, start = [], 0
    while start < q.size(2):
        end = start + sizes[len(outputs) % len(sizes)]
        outputs.append(cache.attend(0, *(x[:, :, start:end] for x in (q, k, v))))
        assert cache.lengths.max() <= cache.slots
        start = end
    return torch.cat(outputs, dim=2)


def kept(cache, b, g):
    """The positions in a head's slots of layer 0, in order."""
    full = cache.seen[0] > cache.slots
    used = [i for i in range(cache.slots + 1)
            if (i != int(cache.hole[0, b, g]) if full else i < cache.seen[0])]
    return sorted(cache.positions[0, b, g, used].tolist())


@given(names, seeds, groups, st.integers(1, 24), budgets, portions)
@settings(max_examples=60)
def test_a_policy_keeps_what_a_list_of_tokens_does(name, seed, heads, T, slots, sizes):
    config = config_of(heads, dmc=False)
    q, k, v, _, _ = qkv(seed, heads, T)
    cache = policy_cache(name, slots)(config, 2, dtype=torch.float64)
    y = taken_in(cache, q, k, v, sizes)
    for b in range(2):
        expected, positions = literal_policy(name, *(x[b].numpy() for x in (q, k, v)), slots,
                                             config.rope_theta)
        assert_close(y[b], torch.from_numpy(expected))
        assert [kept(cache, b, g) for g in range(heads[1])] == positions
    assert (cache.lengths[0] == min(T, slots)).all() and cache.seen[0] == T


@given(names, seeds, groups, st.integers(1, 20), budgets)
@settings(max_examples=30)
def test_a_later_token_never_changes_an_earlier_output(name, seed, heads, T, slots):
    config = config_of(heads, dmc=False)
    texts = [qkv(s, heads, 24)[:3] for s in (seed, seed + 1)]
    texts[1] = tuple(torch.cat([a[:, :, :T], b[:, :, T:]], dim=2)
                     for a, b in zip(*texts, strict=True))
    ys = [policy_cache(name, slots)(config, 2, dtype=torch.float64).attend(0, *text)
          for text in texts]
    assert torch.equal(ys[0][:, :, :T], ys[1][:, :, :T])
    assert not torch.equal(ys[0], ys[1])


# ------------------------------------------------------------------------------- edges and budgets

@given(names, seeds, st.sampled_from([(4, 4), (4, 2)]), st.integers(1, 24), st.integers(0, 3))
@settings(max_examples=20)
def test_with_room_for_all_it_is_the_plain_model(name, seed, heads, T, spare):
    model = model_of(seed, heads, dmc=False)
    tokens = torch.randint(0, 29, (2, T))
    cache = policy_cache(name, T + spare)(model.config, 2, dtype=torch.float64)
    assert_close(model(tokens, cache)[0], model(tokens)[0])
    assert cache.compression_ratio == 1 and cache.bytes.used == 2 * 2 * T * 2 * heads[1] * 8 * 8


@pytest.mark.parametrize("name", ["h2o", "tova", "window", "sinks"])
def test_a_policy_is_a_cache(name):
    """What evaluation and generation read of a cache, in every layer; a dtype; the bytes."""
    model = model_of(0, (4, 2), dmc=False).float()
    cache = policy_cache(name, 4)(model.config, 2)
    model(torch.randint(0, 29, (2, 20)), cache)
    assert cache.seen == [20, 20] and cache.compression_ratio == 5 and cache.gain == 1.0
    assert cache.lengths.shape == (2, 2, 2) and (cache.lengths == 4).all()
    assert cache.bytes.used == (2 * 2 * 2 * 4) * 2 * 8 * 4 < cache.bytes.allocated
    with pytest.raises(ValueError, match="decisions"):
        cache.attend(0, *qkv(0, (4, 2), 1)[:4])
    with pytest.raises(ValueError, match="64 positions"):
        model(torch.zeros(2, 45, dtype=torch.long), cache)


@pytest.mark.parametrize("name", ["h2o", "tova", "window", "sinks"])
def test_a_policy_generates(name):
    """With room for all the same text as the plain cache; with less, within its budget."""
    model, prompt = model_of(4, (4, 2), dmc=False), [3, 1, 4, 1, 5]
    texts = []
    for cache in (model.new_cache(1), *(policy_cache(name, slots)(
            model.config, 1, dtype=torch.float64) for slots in (64, 4))):
        choose = lambda logits, position: logits.argmax().item()
        texts.append(list(generate(model, cache, prompt, 20, choose)))
    assert texts[0] == texts[1] and len(texts[2]) == 20
    assert (cache.lengths == 4).all() and cache.seen[0] >= 24


@pytest.mark.parametrize("name", ["h2o", "tova", "window", "sinks"])
def test_a_block_of_tokens_takes_part_like_single_ones(name, monkeypatch):
    """However many are taken in at once, while they fit."""
    q, k, v, _, _ = qkv(3, (4, 2), 30)
    ys = []
    for block in (1, 4, 256):
        monkeypatch.setattr("nanodmc.policies.BLOCK", block)
        cache = policy_cache(name, 17)(config_of((4, 2), dmc=False), 2, dtype=torch.float64)
        ys.append(cache.attend(0, q, k, v))
    assert_close(ys[0], ys[1], 1e-12)
    assert_close(ys[0], ys[2], 1e-12)


@pytest.mark.parametrize(("name", "ends_with"), [
    ("tova", [6, 7, 8]), ("h2o", [0, 7, 8]), ("window", [6, 7, 8]), ("sinks", [0, 1, 8])])
def test_among_equals_the_oldest_goes(name, ends_with):
    """Keys that are all 0: every slot gets the same attention, and the first ones most votes."""
    q, k, v, _, _ = qkv(0, (4, 2), 9)
    cache = policy_cache(name, 3)(config_of((4, 2), dmc=False), 2, dtype=torch.float64)
    cache.attend(0, q, torch.zeros_like(k), v)
    assert all(kept(cache, b, g) == ends_with for b in range(2) for g in range(2))


def test_a_budget_is_rounded_down_and_never_below_one():
    assert [budget(length, 2) for length in (1, 2, 3, 64)] == [1, 1, 1, 32]
    assert budget(110, 1.1) == 100 and budget(7, 1) == 7 and budget(3, 4.0) == 1
    for cr in (0.5, 0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="from 1 on"):
            budget(10, cr)


def test_what_is_refused():
    with pytest.raises(InputError, match="no policy lru; choose from h2o, tova, window, sinks"):
        policy_cache("lru", 4)
    for slots in (0, -3):
        with pytest.raises(InputError, match="below 1"):
            policy_cache("tova", slots)
    with pytest.raises(InputError, match="weights of a DMC model"):
        policy_cache("tova", 4)(config_of(), 2)
    with pytest.raises(NotImplementedError):                   # a class that is no policy yet
        cache = EvictingCache(config_of(dmc=False), 2, dtype=torch.float64, slots=1)
        cache.attend(0, *qkv(0, (4, 4), 2)[:3])


# ------------------------------------------------------------------------------------- the page

def test_the_example_in_the_docs_is_a_policy(monkeypatch):
    """The page's code as it stands there; and its table names all policies there are."""
    page = (HERE / "docs/policies.md").read_text()
    assert re.findall(r"^\| `(?!--)([\w-]+)`", page, re.MULTILINE) == list(POLICIES)
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.setattr("nanodmc.policies.POLICIES", POLICIES.copy())
    exec(code, {})
    q, k, v, _, _ = qkv(1, (4, 2), 12)
    cache = policy_cache("short-keys", 5)(config_of((4, 2), dmc=False), 2, dtype=torch.float64)
    y = cache.attend(0, q, k, v)
    kept_norms = k[0, 0, kept(cache, 0, 0)].norm(dim=-1)      # rotation changes no norm
    assert sorted(kept_norms.tolist()) == sorted(k[0, 0].norm(dim=-1).tolist())[:5]
    plain = Cache(config_of((4, 2), dmc=False), 2, dtype=torch.float64).attend(0, q, k, v)
    assert_close(y[:, :, :6], plain[:, :, :6])
