"""Properties of nanodmc/peers.py: the same decoding by others."""

import types

import torch

import dmc_fast
from conftest import oracle
from nanodmc import checkpoint, peers, sampling
from nanodmc.config import shape
from test_dmc import assert_close, model_of, through_cache


@torch.no_grad()
def test_the_compiled_peer_attends_as_a_cache():
    model = model_of(0, (8, 2), dmc=False)
    tokens = torch.randint(0, 29, (2, 12))
    reference = through_cache(model, tokens, 1)[0]
    cache, logits = peers.StaticCache(model.config, 2, None, torch.float64, 0, 20), []
    for t in range(12):
        logits.append(sampling.next_logits(model, tokens[:, t:t + 1], cache)[:, None])
        cache.at.add_(1)
    assert_close(torch.cat(logits, dim=1), reference, 1e-5)      # its angles are fp32


@torch.no_grad()
def test_the_transformers_peer_has_the_same_weights_and_logits():
    oracle("transformers")
    config = shape("toy")
    model = checkpoint.random_model(config, dmc_fast, "cpu", torch.float32)
    bench = types.SimpleNamespace(model=model, config=config, device=torch.device("cpu"))
    tokens = torch.randint(0, 512, (2, 20))
    assert_close(peers.as_transformers(bench)(tokens).logits, model(tokens)[0], 1e-4)
