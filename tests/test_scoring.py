"""Properties of nanodmc/scoring.py: batches score what one token after the other does."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc import Cache
from nanodmc import scoring
from nanodmc.baselines import pooling_cache
from nanodmc.files import InputError
from nanodmc.policies import POLICIES, budget, policy_cache
from test_dmc import model_of, seeds

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS = 12
ids = partial(st.lists, st.integers(0, 28), min_size=1)
PAIRS = st.lists(st.tuples(ids(max_size=16), ids(max_size=9)), min_size=1, max_size=6)


@torch.no_grad()
def literally(model, pair, gain, make_cache):
    """One pair, token by token: log-likelihood, greedy, tokens and slots."""
    context, continuation = pair
    text = (context + continuation)[-(POSITIONS + 1):]
    cache = make_cache(len(text) - 1)(model.config, 1, None, torch.float64)
    total, greedy = 0.0, True
    for t, (token, following) in enumerate(zip(text, text[1:], strict=False)):
        scores = model(torch.tensor([[token]]), cache, gain=gain)[0][0, 0]
        if t >= len(text) - 1 - len(continuation):
            total += scores.log_softmax(-1)[following].item()
            greedy &= scores.argmax().item() == following
    heads = cache.lengths[0].numel() * model.config.n_layer
    return total, greedy, (len(text) - 1) * heads, cache.lengths.sum().item()


def assert_same(model, pairs, gain=None, cache_for=None):
    scores = scoring.score(model, pairs, gain, cache_for)
    for one, pair in zip(scores, pairs, strict=True):
        make_cache = cache_for or (lambda length: Cache)
        assert one == pytest.approx(literally(model, pair, gain, make_cache), abs=1e-9)


@given(seeds, PAIRS, st.sampled_from([None, 0.0]))
@settings(max_examples=25, deadline=None)
def test_scores_are_those_of_the_cache_token_by_token(seed, pairs, gain):
    """The parallel form, in batches of any size, and without any decision for gain 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "CPU_SIZE", 1 + seed % 40)
        patch.setattr(scoring, "CHUNK", 1 + seed % 7)
        assert_same(model_of(seed, (4, 2), max_seq_len=POSITIONS), pairs, gain)


@given(seeds, PAIRS, st.sampled_from(["pool", *POLICIES]), st.sampled_from([1, 1.5, 3]))
@settings(max_examples=25, deadline=None)
def test_a_budget_goes_by_each_texts_own_length(seed, pairs, name, cr):
    def cache_for(length):
        return (pooling_cache(Cache, 3) if name == "pool"
                else policy_cache(name, budget(length, cr)))
    model = model_of(seed, (4, 2), max_seq_len=POSITIONS, dmc=name == "pool")
    assert_same(model, pairs, cache_for=cache_for)


@pytest.mark.parametrize("count", [0, POSITIONS + 1, 3 * POSITIONS])
def test_a_continuation_without_a_score_is_refused(count):
    """Not even beside others; one token fewer is scored."""
    model, longest = model_of(0, max_seq_len=POSITIONS), ([1], [2] * POSITIONS)
    with pytest.raises(InputError, match=f"{count} tokens, and this model scores from 1 to 12"):
        scoring.score(model, [longest, ([1], [2] * count)])
    assert_same(model, [longest])


def test_equal_inputs_are_worked_on_once():
    """Four answers of one token each; and progress adds up to what was promised."""
    told, pairs = [], [([1, 2, 3], [i]) for i in range(4)] + [([1, 2, 3], [4, 5])]
    model = model_of(0, max_seq_len=POSITIONS)
    scores = scoring.score(model, pairs, each_batch=told.append)
    assert sum(told) == scoring.work(model, pairs) == 3 + 4
    likelihoods = torch.tensor([one.logprob for one in scores[:4]], dtype=torch.float64)
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3]]))[0][0, -1].log_softmax(-1)[:4]
    assert torch.allclose(likelihoods, expected)
