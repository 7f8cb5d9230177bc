"""Properties of nanodmc/short_step.py: the same results, of fewer launches and the same memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dmc
import dmc_fast
from conftest import largest_error
from nanodmc.baselines import paged_cache
from nanodmc.sampling import next_logits
from nanodmc.short_step import ShortStep, add_norm, silu_product
from nanodmc.variants import VARIANTS, VariantConfig, ops_of
from test_dmc import assert_close, groups, kernels, model_of, on_cpu, seeds, windows
from test_engine import no_kernels_run  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
DECIDING = [name for name in VARIANTS if name != "gqa"]


def tokens_of(seed, B, T):
    return torch.randint(29, (B, T), generator=torch.Generator().manual_seed(seed))


def steps(model, tokens, step, gain=None):
    """Logits of every token behind the fifth, and the cache. step(tokens (B, 1), cache)."""
    weight = next(model.parameters())
    cache = paged_cache(model.config)(model.config, len(tokens), weight.device, weight.dtype)
    with torch.no_grad():
        next_logits(model, tokens[:, :5], cache, gain)
        logits = [step(x, cache) for x in tokens[:, 5:].split(1, dim=1)]
    return torch.stack(logits, 1), cache


@on_cpu
@pytest.mark.parametrize("name", DECIDING)
@given(seeds, groups, windows, st.sampled_from([None, 0.0]))
@settings(max_examples=8)
def test_a_short_step_is_a_step(name, seed, heads, window, gain):
    plain = model_of(seed, heads, window)
    config = VariantConfig(**vars(plain.config), variant=name, every=3 if name == "fmp" else None)
    model = dmc.Transformer(config, ops_of(config, dmc_fast)).double()
    model.load_state_dict(plain.state_dict())
    tokens = tokens_of(seed, 2, 20)
    expected, cache = steps(model, tokens, lambda x, c: next_logits(model, x, c, gain), gain)
    short = ShortStep(model)
    ours, same = steps(model, tokens, lambda x, c: short.logits(x, c, gain), gain)
    assert_close(ours, expected)
    assert torch.equal(cache.lengths, same.lengths)


def storages(model):
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for p in model.parameters()}


def test_weights_are_joined_without_a_copy():
    model = model_of(0, (8, 2), tie_embeddings=True)
    before, weights = sum(storages(model).values()), model.state_dict()
    weights = {name: w.clone() for name, w in weights.items()}
    short = ShortStep(model)
    assert sum(storages(model).values()) == before
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    again = ShortStep(model)                             # finds them joined
    for ours, theirs in ((short.qkv, again.qkv), (short.gate_up, again.gate_up)):
        assert all(a.is_set_to(b) for a, b in zip(ours, theirs, strict=True))
    model.layers[0].self_attn.k_proj.weight.data[:] = 1  # and what changes in one changes in both
    assert (short.qkv[0][64:80] == 1).all()
    model.layers[0].self_attn.v_proj.weight = torch.nn.Parameter(torch.zeros(16, 32).double())
    assert (ShortStep(model).qkv[0][80:] == 0).all()     # one that was replaced is joined anew


# ---------------------------------------------------------------------- kernels in the interpreter

@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows,n", [(1, 8), (3, 24), (2, 1500)])
def test_sum_norm_and_product_kernels(dtype, rows, n):
    """At most one rounding apart from PyTorch's operations."""
    torch.manual_seed(n)
    x, y = torch.randn(2, rows, 1, n).to(dtype)
    norm = torch.nn.RMSNorm(n, eps=1e-3)
    norm.weight.data.normal_()
    norm = norm.to(dtype)
    total = x + y
    exact = torch.nn.functional.rms_norm(total.double(), (n,), norm.weight.double(), norm.eps)
    both = torch.randn(rows, 1, 2 * n).to(dtype)
    gate, up = both.double().chunk(2, -1)
    product = torch.nn.functional.silu(gate).to(dtype).double() * up
    x, normed = add_norm(x, y, norm)
    assert torch.equal(x, total)
    bound = 2 * torch.finfo(dtype).eps
    assert largest_error(normed, exact) < bound
    assert largest_error(silu_product(both), product) < bound


@kernels
@given(seeds, groups, windows)
@settings(max_examples=6)
def test_decisions_made_in_the_step_kernel_are_those_of_decide(seed, heads, window):
    check_short_step(model_of(seed, heads, window, dmc_fast).float(), tokens_of(seed, 2, 16))


def check_short_step(model, tokens):
    """Against Transformer.hidden with the same kernels, in fp32."""
    expected, cache = steps(model, tokens, lambda x, c: next_logits(model, x, c))
    short = ShortStep(model)
    ours, same = steps(model, tokens, short.logits)
    assert same.kernels and torch.equal(cache.lengths, same.lengths)
    assert largest_error(ours, expected) < 1e-4


# ------------------------------------------------------------------------------------- launches

class Moves(TorchDispatchMode):
    """PyTorch's operators that read or write elements, with their bytes; no views."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not views and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            tensors = [x for x in tree_leaves((args, kwargs or {}, out))
                       if isinstance(x, torch.Tensor)]
            self.moved.append((name, sum(x.nbytes for x in tensors)))
        return out


@on_cpu
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_a_layer_of_a_step_takes_few_launches(no_kernels_run, heads, measured):  # noqa: F811
    """The difference that a layer makes; kernels only count. A long product may take two."""
    def launches(layers, make):
        model = model_of(0, heads, ops=dmc_fast, n_layer=layers).float()
        cache = dmc_fast.PagedCache(model.config, 2)
        cache.ages[:], cache.lengths[:], cache.seen = 5, 3, [5] * layers
        step = make(model)
        no_kernels_run.clear()
        with torch.no_grad(), Moves() as moves:
            step(tokens_of(0, 2, 1), cache)
        return [*(name for name, _ in moves.moved), *no_kernels_run]

    def of_a_layer(make):
        return len(launches(3, make)) - len(launches(2, make))

    short = of_a_layer(lambda model: ShortStep(model).logits)
    long = of_a_layer(lambda model: lambda x, cache: next_logits(model, x, cache))
    measured[f"{heads[0]} heads over {heads[1]}, launches per layer and step"] = {
        "short step": short, "Transformer.hidden": long}
    assert short <= 12
    assert "decode_kernel" in launches(2, lambda model: ShortStep(model).logits)
