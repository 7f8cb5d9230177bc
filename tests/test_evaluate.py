"""Properties of nanodmc/evaluate.py: what it measures is what the cache does token by token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmc
from dmc import Cache, Transformer
from nanodmc import baselines
from nanodmc.evaluate import decisions, evaluate
from nanodmc.parallel import control_rows
from nanodmc.settings import Settings
from test_dmc import both, model_of, seeds

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny models

SMALL = Settings(layers=2, heads=2, kv_heads=1, dim=16, ffn_dim=16, context=16, eval_sequences=3)


def merging_model(ops):
    """A small model that merges often."""
    torch.manual_seed(0)
    model = Transformer(replace(SMALL.small_config(), **SMALL.method(dmc=True)), ops)
    for rows in control_rows(model):
        rows.normal_(std=3.0)
    return model


@both
@torch.no_grad()
def test_evaluation_is_the_loss_through_the_cache_token_by_token(ops):
    model = merging_model(ops)
    tokens = np.random.default_rng(0).integers(0, 257, 3 * 16 + 1).astype(np.uint16)
    loss, cr, heads = evaluate(model, tokens, SMALL)
    losses, slots = [], []
    for start in (0, 16, 32):
        x = torch.from_numpy(tokens[start:start + 17].astype(np.int64))
        cache = Cache(model.config, 1)
        logits = torch.cat([model(x[None, t:t + 1], cache)[0] for t in range(16)], dim=1)
        losses += (-logits[0].log_softmax(-1)[torch.arange(16), x[1:]]).tolist()
        slots.append(cache.lengths[:, 0])
    slots = torch.stack(slots).double()
    assert loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert cr == pytest.approx(16 / slots.mean().item())
    assert torch.allclose(torch.tensor(heads).double(), 16 / slots.mean(0)) and cr > 1.05


def test_evaluation_takes_another_cache():
    """A policy of its own in the place of the model's, and no other difference."""
    torch.manual_seed(0)
    model = Transformer(replace(SMALL.small_config(), **SMALL.method(dmc=False)))
    tokens = np.random.default_rng(0).integers(0, 257, 3 * 16 + 1).astype(np.uint16)
    own, every_one = (evaluate(model, tokens, SMALL, make)
                      for make in (None, baselines.pooling_cache(dmc.Cache, 1)))
    assert every_one == (pytest.approx(own[0], abs=1e-6), own[1], own[2])
    assert evaluate(model, tokens, SMALL, baselines.pooling_cache(dmc.Cache, 4))[1] == 4


@given(seeds, st.integers(1, 40))
@settings(max_examples=10)
def test_decisions_are_those_of_the_cache(seed, length):
    """Of texts longer than the model's positions, piece by piece. A slot begins with an append."""
    model = model_of(seed, (4, 2), max_seq_len=16)
    ids = torch.randint(0, 29, (length,)).tolist()
    alpha = decisions(model, ids)
    assert alpha.shape == (2, 2, length) and set(alpha.unique().tolist()) <= {0.0, 1.0}
    for start in range(0, length, 16):
        cache = Cache(model.config, 1, dtype=torch.float64)
        tokens = torch.tensor([ids[start:start + 16]]).split(1, dim=1)
        decided = torch.cat([model(token, cache)[1] for token in tokens], dim=-1)
        assert torch.equal(alpha[..., start:start + 16].double(), decided[:, 0])
        assert torch.equal((1 - decided[:, 0]).sum(-1), cache.lengths[:, 0].double())
