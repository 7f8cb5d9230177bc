"""Properties of nanodmc/peers.py: the same decoding by others."""

import types
import weakref

import pytest
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
    tokens = torch.randint(0, config.vocab_size, (2, 20))
    assert_close(peers.as_transformers(bench)(tokens).logits, model(tokens)[0], 1e-4)


def test_the_compiled_peer_writes_each_layers_tensor_in_place():
    """One of all layers would be copied at each step, as what is written to is a view of it."""
    model = model_of(0, (8, 2), dmc=False)
    cache = peers.StaticCache(model.config, 2, None, torch.float64, 3, 20)
    tensors = [*cache.keys, *cache.values]
    assert len(tensors) == 2 * model.config.n_layer
    assert all(not x._is_view() and x.shape == (2, 2, 20, 8) for x in tensors)
    before = [(x.data_ptr(), x._version) for x in tensors]
    with torch.no_grad():
        sampling.next_logits(model, torch.zeros(2, 1, dtype=torch.long), cache)
    after = [(x.data_ptr(), x._version) for x in (*cache.keys, *cache.values)]
    assert after == [(place, version + 1) for place, version in before]


def chained(inner):
    try:
        try:
            raise inner
        except type(inner) as error:
            raise TypeError("the compiler failed") from error
    except TypeError as error:
        return error


@pytest.mark.parametrize("error,expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True), (MemoryError(), True),
    (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: not enough memory"),
     True), (chained(torch.OutOfMemoryError("CUDA")), True),
    (RuntimeError("CUDA error: an illegal memory access"), False),
    (KeyError("out of memory"), False),
    (ImportError("no"), False), (chained(KeyError("x")), False)])
def test_memory_that_runs_out_is_known_by_all_its_names(error, expected):
    assert peers.out_of_memory(error) == expected


def test_each_try_of_a_peer_begins_without_the_last_ones_memory(monkeypatch):
    """Tensors in a cycle, and in the frame of what failed, are gone when the next one begins."""
    held, resets = [], []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))

    def large(bench, batch):
        assert not [x for x in held if x() is not None]
        cache = torch.zeros(batch)
        cycle = [cache]
        cycle.append(cycle)
        held.append(weakref.ref(cache))
        if batch > 6:
            raise torch.OutOfMemoryError
        return 1.0
    monkeypatch.setitem(peers.PEERS, "large", large)
    row = peers.peer_row("large", types.SimpleNamespace(device=torch.device("cpu")), 10)
    assert row["batch"] == 6 and len(held) == 3 == len(resets)
    assert "error" in peers.peer_row("large", types.SimpleNamespace(device=torch.device("cpu")), 90)
