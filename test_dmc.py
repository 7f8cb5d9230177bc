"""Properties of the method, of the runs and of the command lines: pytest + hypothesis.

The oracles stand first. They are written from the paper's text, token by token, in numpy and fp64, and share no code
with what they check.
"""

import ast
import base64
import codecs
import contextlib
import gzip
import html
import json
import lzma
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import dmc
import dmc_fast
import generate
import train
from dmc import Cache, Config, InputError, Transformer

HERE = Path(__file__).parent
settings.register_profile("dmc", deadline=None, max_examples=25, derandomize=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("dmc")
torch.set_num_threads(2)
INTERPRETED = dmc_fast.INTERPRETED
on_cpu = pytest.mark.skipif(INTERPRETED, reason="PyTorch's operations are tested without the interpreter")
kernels = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_kernels_in_the_interpreter starts")


# ------------------------------------------------------------------------------------------------ oracles

def literal_accumulate(x, alpha, omega, window):
    """Eq. 9 of one head, literally. x (T, D), alpha, omega (T,). With a window each token runs the recurrence anew,
    from an empty state, over the last `window` tokens."""
    out = np.zeros_like(x)
    for t in range(len(x)):
        first = 0 if window is None else max(0, t - window + 1)
        z, mean = 0.0, np.zeros(x.shape[1])
        for i in range(first, t + 1):
            z_new = alpha[i] * z + omega[i]
            mean = (alpha[i] * z * mean + omega[i] * x[i]) / z_new
            z = z_new
        out[t] = mean
    return out


def literal_rotate(x, position, theta):
    """Rotary embedding of one vector, as a multiplication of complex numbers."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-2 * np.arange(half) / len(x)))
    return np.concatenate([turned.real, turned.imag])


def literal_attention(query, keys, values):
    scores = np.array([query @ key for key in keys]) / math.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights @ np.array(values) / weights.sum()


def literal_algorithm1(q, k, v, alpha, omega, window, theta, silent=True):
    """Algorithm 1 of one key-value head. q (R, T, D): the R query heads of its group; k, v (T, D); alpha in {0, 1}.

    A segment is a list of tokens; its slot is the weighted average over the last `window` of them, rotated at the latest.
    Returns the outputs (R, T, D) and the number of slots.
    """
    def rotated(x, position):
        x = x.copy()
        x[0] *= not silent
        x = literal_rotate(x, position, theta)
        x[0] *= not silent
        return x

    R, T, D = q.shape
    segments, out = [], np.zeros_like(q)
    for t in range(T):
        if t > 0 and alpha[t] == 1:
            segments[-1].append(t)
        else:
            segments.append([t])
        recent = [s if window is None else s[-window:] for s in segments]
        mean_k, mean_v = ([(omega[s][:, None] * x[s]).sum(0) / omega[s].sum() for s in recent] for x in (k, v))
        keys = [rotated(key, s[-1]) for key, s in zip(mean_k, recent, strict=True)]
        for r in range(R):
            out[r, t] = literal_attention(rotated(q[r, t], t), keys, mean_v)
    return out, len(segments)


def literal_llama(model, tokens):
    """Logits (T, vocab) of a plain Llama for one sequence, from the weights alone."""
    w = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    c = model.config
    norm = lambda x, weight: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.norm_eps) * weight
    x = w["embed_tokens.weight"][tokens]
    for i in range(c.n_layer):
        part = lambda name, i=i: w[f"layers.{i}.{name}.weight"]
        h = norm(x, part("input_layernorm"))
        q, k, v = ((h @ part(f"self_attn.{n}_proj").T).reshape(len(tokens), -1, c.head_dim) for n in "qkv")
        y = np.zeros_like(q)
        for head in range(c.n_head):
            g = head // (c.n_head // c.n_kv_head)
            keys = [literal_rotate(k[t, g], t, c.rope_theta) for t in range(len(tokens))]
            for t in range(len(tokens)):
                y[t, head] = literal_attention(literal_rotate(q[t, head], t, c.rope_theta), keys[:t + 1], v[:t + 1, g])
        x = x + y.reshape(len(tokens), -1) @ part("self_attn.o_proj").T
        h = norm(x, part("post_attention_layernorm"))
        gate = h @ part("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ part("mlp.up_proj").T)) @ part("mlp.down_proj").T
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


# ------------------------------------------------------------------------------------------------ drawn inputs

both = pytest.mark.parametrize("ops", [dmc, dmc_fast], ids=["reference", "fast"])
windows = st.sampled_from([None, 1, 2, 3, 12, 100])
lengths = st.sampled_from([1, 2, 3, 7, 13, 17, 30])
groups = st.sampled_from([(4, 4), (3, 1), (8, 2), (6, 2), (1, 1)])      # (H, G): groups of 1, 3, 4, 3, 1
seeds = st.integers(0, 10_000)


def config_of(heads=(4, 4), window=12, **changes):
    H, G = heads
    return Config(**{**dict(vocab_size=29, n_layer=2, n_head=H, n_kv_head=G, dim=4 * H, head_dim=8, ffn_dim=24, max_seq_len=64,
                            window=window, c=0.5), **changes})


def qkv(seed, heads, T, B=2, D=8, merge=None):
    """Random q, k, v, decisions in {0, 1} and importances, fp64. merge: the probability of a merge."""
    H, G = heads
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, T, D, generator=rng, dtype=torch.float64) for n in (H, G, G))
    merge = torch.rand((), generator=rng).item() if merge is None else merge
    alpha = (torch.rand(B, G, T, generator=rng) < merge).double()
    alpha[..., 0] = 0
    return q, k, v, alpha, torch.rand(B, G, T, generator=rng, dtype=torch.float64) + 0.01


def model_of(seed, heads=(4, 4), window=12, ops=dmc, **changes):
    """A Transformer in fp64 whose weights are large enough that decisions and attention vary."""
    torch.manual_seed(seed)
    model = Transformer(config_of(heads, window, **changes), ops).double()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.5)
    return model


def parallel_form(ops, q, k, v, alpha, omega, config):
    """The training form on decisions that are given: Eq. 9, rotation, the mask."""
    k, v = ops.accumulate(k, v, alpha, omega, config.window)
    cos, sin = dmc.rotary_table(config, q.size(2))
    return ops.attend(dmc.rotate_heads(q, cos, sin, 0.0), dmc.rotate_heads(k, cos, sin, 0.0), v, torch.log1p(-alpha))


def through_cache(model, tokens, split, **kwargs):
    """Logits of a model whose cache takes the tokens in portions of the given sizes."""
    cache = model.Cache(model.config, len(tokens), dtype=torch.float64)
    return torch.cat([model(part, cache, **kwargs)[0] for part in tokens.split(split, dim=1)], dim=1), cache


def slots_of(cache, layer, b, g):
    """The keys and the values in the slots of one head, (slots, D) each, oldest first."""
    n = int(cache.lengths[layer, b, g])
    if isinstance(cache, dmc_fast.PagedCache):
        pages = cache.table[layer, b, g].long()
        return [pool[pages].flatten(0, 1)[:n] for pool in (cache.pool_k, cache.pool_v)]
    return [slots[layer][b, g, :n] for slots in (cache.keys, cache.values)]


def assert_close(a, b, tolerance=1e-9):
    assert a.shape == b.shape and (a - b).abs().max().item() < tolerance


# ------------------------------------------------------------------------------------------------ Eq. 8

@given(seeds, st.floats(-3, 8), st.sampled_from([0.1, 0.4, 1.0]))
def test_decision_is_eq8(seed, logit, tau):
    config = config_of(tau=tau, c=5.0)
    torch.manual_seed(seed)
    x = torch.full((1, 1, 20_001), logit)
    alpha, keep = dmc.relaxed_decision(x, config, noise=True)
    # sigmoid((logit - c + logistic noise) / tau) > 1/2 where the logistic sample exceeds c - logit
    p = 1 / (1 + math.exp(5.0 - logit))
    assert abs((alpha[..., 1:] > 0.5).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / 20_000)
    inside = alpha.double() < 0.99
    assert_close(torch.log1p(-alpha.double())[inside], keep.double()[inside], 1e-4)
    hard, hard_keep = dmc.relaxed_decision(x, config, noise=False)
    assert (hard[..., 1:] == float(logit > 5.0)).all()
    assert (hard_keep[..., 1:] == (-math.inf if logit > 5.0 else 0.0)).all()
    for first in (alpha, keep, hard, hard_keep):
        assert (first[..., 0] == 0).all()
    assert (dmc.relaxed_decision(x, config, noise=False, start=False)[0] == float(logit > 5.0)).all()


def test_first_decision_has_no_gradient_and_the_others_the_analytic_one():
    logit = torch.tensor([[[9.0, 4.8, 5.3]]], requires_grad=True, dtype=torch.float64)
    config = config_of(c=5.0)
    torch.manual_seed(0)
    alpha, keep = dmc.relaxed_decision(logit, config, noise=True)
    slope = torch.autograd.grad(alpha.sum(), logit, retain_graph=True)[0]
    expected = alpha * (1 - alpha) / config.tau
    assert slope[..., 0] == 0 and torch.allclose(slope, expected.detach(), rtol=1e-9)
    slope = torch.autograd.grad(keep.sum(), logit)[0]
    assert slope[..., 0] == 0 and torch.allclose(slope[..., 1:], (-alpha / config.tau).detach()[..., 1:], rtol=1e-9)


@given(seeds, groups, lengths)
def test_importance_is_the_sigmoid_of_the_groups_mean(seed, heads, T):
    q = qkv(seed, heads, T)[0]
    H, G = heads
    omega = dmc.importance(q[..., 0], G)
    for g in range(G):
        mean = q[:, g * H // G:(g + 1) * H // G, :, 0].numpy().mean(axis=1)
        assert_close(omega[:, g], torch.from_numpy(1 / (1 + np.exp(-mean))))


@both
@pytest.mark.parametrize("extreme", [1e4, -1e4, 50.0, -50.0, 0.0])
@pytest.mark.parametrize("window", [None, 3])
def test_extreme_logits_give_finite_values_and_gradients(ops, extreme, window):
    torch.manual_seed(0)
    config = config_of(window=window)
    q, k, v = (torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3))
    logit = (torch.randn(2, 4, 9) + extreme).requires_grad_()
    weight = (torch.randn(2, 4, 9) * 10 - abs(extreme)).requires_grad_()
    for noise in (True, False):
        alpha, keep = dmc.relaxed_decision(logit, config, noise)
        omega = dmc.importance(weight, 4)
        y = ops.attend(q, *ops.accumulate(k, v, alpha, omega, window), keep)
        loss = y.square().sum() + dmc.compression_loss([alpha], 4)
        grads = torch.autograd.grad(loss, [q, k, v, weight] + ([logit] if noise else []))
        assert all(x.isfinite().all() for x in (y, *grads))
    cache = ops.Cache(config, 2)
    hard = dmc.relaxed_decision(logit, config, noise=False)[0]
    assert all(cache.attend(0, *(x[:, :, t:t + 1] for x in (q, k, v, hard, omega))).isfinite().all() for t in range(9))


# ------------------------------------------------------------------------------------------------ Eq. 9

@both
@given(seeds, lengths, windows)
def test_accumulate_is_the_literal_recurrence(ops, seed, T, window):
    _, k, v, alpha, omega = qkv(seed, (3, 3), T)
    alpha = torch.rand_like(alpha)
    alpha[..., 0] = 0
    k_mean, v_mean = ops.accumulate(k, v, alpha, omega, window)
    for b, g in np.ndindex(2, 3):
        for x, mean in ((k, k_mean), (v, v_mean)):
            expected = literal_accumulate(x[b, g].numpy(), alpha[b, g].numpy(), omega[b, g].numpy(), window)
            assert_close(mean[b, g], torch.from_numpy(expected), 1e-12)


@both
@pytest.mark.parametrize("window", [None, 1, 2, 5, 12])
@pytest.mark.parametrize("binary", [False, True])
def test_accumulate_gradients(ops, window, binary):
    _, k, v, alpha, omega = qkv(3, (2, 2), 6, B=1, D=4, merge=0.5)
    alpha = alpha if binary else torch.rand_like(alpha)
    inputs = [x.requires_grad_() for x in (k, v, alpha, omega)]
    assert torch.autograd.gradcheck(lambda *x: ops.accumulate(*x, window), inputs)


@both
@given(seeds, lengths, st.integers(1, 6))
def test_window_equals_exact_where_no_segment_is_longer(ops, seed, T, window):
    _, k, v, alpha, omega = qkv(seed, (2, 2), T)
    alpha[..., ::window] = 0
    for a, b in zip(ops.accumulate(k, v, alpha, omega, window), ops.accumulate(k, v, alpha, omega), strict=True):
        assert_close(a, b, 1e-12)


@both
@given(seeds, lengths, windows, st.sampled_from([1e-20, 1e-3, 1e6]))
def test_scaling_all_importances_changes_nothing(ops, seed, T, window, factor):
    _, k, v, alpha, omega = qkv(seed, (2, 2), T)
    for a, b in zip(ops.accumulate(k, v, alpha, omega, window), ops.accumulate(k, v, alpha, factor * omega, window),
                    strict=True):
        assert_close(a, b, 1e-12)


@both
@given(seeds, lengths, windows)
def test_merging_identical_keys_and_values_changes_nothing(ops, seed, T, window):
    q, k, v, alpha, omega = qkv(seed, (2, 2), T)
    segment = (1 - alpha).cumsum(-1).long() - 1
    same = [x.gather(2, segment[..., None].expand_as(x)) for x in (k, v)]
    for a, b in zip(ops.accumulate(*same, alpha, omega, window), same, strict=True):
        assert_close(a, b, 1e-12)


@both
@pytest.mark.parametrize("window", [None, 12])
def test_accumulate_keeps_the_dtype_and_sums_in_fp32(ops, window):
    """bf16 in, bf16 out, at the cost of one rounding: half a unit in the last place of fp32 sums."""
    _, k, v, alpha, omega = qkv(0, (2, 2), 40, merge=0.9)
    exact = ops.accumulate(k.bfloat16().double(), v.bfloat16().double(), alpha, omega.float().double(), window)
    half = ops.accumulate(k.bfloat16(), v.bfloat16(), alpha.float(), omega.float(), window)
    for a, b in zip(half, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert ((a.double() - b).abs() <= b.abs() * 2 ** -8 * 1.01 + 1e-6).all()


# ------------------------------------------------------------------------------------------------ appendix F, Eq. 10, 12

@given(seeds, lengths)
def test_mask_entries(seed, T):
    keep = -torch.rand(1, 2, T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = dmc.dmc_mask(keep)
    for i, j in np.ndindex(T, T):
        expected = -math.inf if j > i else 0.0 if j == i else keep[0, 0, j + 1].item()
        assert mask[0, 0, i, j].item() == expected


@both
@given(seeds, groups, lengths)
def test_no_merges_is_plain_causal_attention(ops, seed, heads, T):
    q, k, v, _, omega = qkv(seed, heads, T)
    zeros = torch.zeros_like(omega)
    k_same, v_same = ops.accumulate(k, v, zeros, omega, 12)
    assert_close(ops.attend(q, k_same, v_same, zeros), ops.attend(q, k, v))


def test_compression_loss_value_and_gradient():
    alpha = torch.rand(3, 2, 4, 10, dtype=torch.float64, requires_grad=True)
    kept = [1 - alpha.detach()[:, b].numpy().mean() for b in range(2)]
    for cr in (1.0, 1.5, 2.0, 4.0, 100.0):
        expected = np.mean([max(0.0, x - 1 / cr) for x in kept])
        loss = dmc.compression_loss(alpha, cr)
        assert abs(loss.item() - expected) < 1e-12
        assert abs(dmc.compression_loss(list(alpha), cr).item() - expected) < 1e-12
        slope = torch.autograd.grad(loss, alpha)[0]
        for b in range(2):
            assert_close(slope[:, b], torch.full_like(slope[:, b], -float(kept[b] > 1 / cr) / (2 * 3 * 4 * 10)))
    at_target = torch.tensor([0.0, 1.0]).repeat(3, 2, 4, 5)
    assert dmc.compression_loss(at_target, 2.0).item() == 0
    assert dmc.compression_loss(at_target, 1.9).item() == 0
    assert dmc.compression_loss(at_target, 2.1).item() > 0


def test_channel_gain_is_eq12():
    assert [dmc.channel_gain(s, 4) for s in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]


@both
@given(seeds, groups, windows)
def test_control_channels_act_only_through_alpha_and_omega(ops, seed, heads, window):
    config = config_of(heads, window)
    q, k, v, alpha, omega = qkv(seed, heads, 11)
    reference, other = ops.Cache(config, 2, dtype=torch.float64), ops.Cache(config, 2, dtype=torch.float64)
    y = parallel_form(ops, q, k, v, alpha, omega, config)
    z = reference.attend(0, q, k, v, alpha, omega)
    q[..., 0], k[..., 0] = 1e3, -1e3
    assert_close(parallel_form(ops, q, k, v, alpha, omega, config), y)
    assert_close(other.attend(0, q, k, v, alpha, omega), z)


@both
@given(seeds, groups)
def test_faded_channels_are_invisible_and_full_ones_are_not(ops, seed, heads):
    model = model_of(seed, heads, ops=ops)
    tokens = torch.randint(0, 29, (2, 9))
    faded, full = model(tokens, gain=0.0)[0], model(tokens, gain=1.0)[0]
    with torch.no_grad():
        for row in model.control_rows():
            row.normal_()
    assert_close(model(tokens, gain=0.0)[0], faded)
    assert (model(tokens, gain=1.0)[0] - full).abs().max() > 1e-6
    model.clear_control_rows()
    assert_close(model(tokens, gain=1e-9)[0], faded, 1e-6)      # Eq. 12 has no jump at its end


# ------------------------------------------------------------------------------------------------ Algorithm 1

@both
@given(seeds, groups, lengths, windows)
def test_cache_and_parallel_form_are_algorithm1(ops, seed, heads, T, window):
    config = config_of(heads, window)
    q, k, v, alpha, omega = qkv(seed, heads, T)
    cache = ops.Cache(config, 2, dtype=torch.float64)
    stepwise = torch.cat([cache.attend(1, *(x[:, :, t:t + 1] for x in (q, k, v, alpha, omega))) for t in range(T)], dim=2)
    parallel = parallel_form(ops, q, k, v, alpha, omega, config)
    H, G = heads
    for b, g in np.ndindex(2, G):
        group = slice(g * H // G, (g + 1) * H // G)
        y, slots = literal_algorithm1(*(x.numpy() for x in (q[b, group], k[b, g], v[b, g], alpha[b, g], omega[b, g])),
                                      window, config.rope_theta)
        assert_close(stepwise[b, group], torch.from_numpy(y))
        assert_close(parallel[b, group], torch.from_numpy(y))
        assert cache.lengths[1, b, g] == slots == (1 - alpha[b, g]).sum()
    assert (cache.lengths[0] == 0).all()


@both
@given(seeds, groups, lengths, windows, st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_any_split_into_portions_equals_one_by_one(ops, seed, heads, T, window, portions):
    config = config_of(heads, window)
    inputs = qkv(seed, heads, T)
    one_by_one, split = ops.Cache(config, 2, dtype=torch.float64), ops.Cache(config, 2, dtype=torch.float64)
    portions = [min(n, T) for n in portions] + [T]
    starts = np.minimum(np.cumsum([0, *portions]), T)
    y = [[cache.attend(0, *(x[:, :, a:b] for x in inputs)) for a, b in zip(cuts[:-1], cuts[1:], strict=True) if b > a]
         for cache, cuts in ((one_by_one, np.arange(T + 1)), (split, starts))]
    assert_close(torch.cat(y[0], dim=2), torch.cat(y[1], dim=2))
    assert (one_by_one.lengths == split.lengths).all()
    for b, g in np.ndindex(2, heads[1]):
        for mine, theirs in zip(slots_of(one_by_one, 0, b, g), slots_of(split, 0, b, g), strict=True):
            assert_close(mine, theirs)


@both
@given(seeds, groups, lengths, windows)
def test_all_merges_leave_one_slot(ops, seed, heads, T, window):
    config = config_of(heads, window)
    q, k, v, _, omega = qkv(seed, heads, T)
    for split in (1, T):
        cache = ops.Cache(config, 2, dtype=torch.float64)
        for part in zip(*(x.split(split, dim=2) for x in (q, k, v, torch.ones_like(omega), omega)), strict=True):
            y = cache.attend(0, *part)
        assert (cache.lengths[0] == 1).all()
        expected = ops.accumulate(k, v, torch.ones_like(omega), omega, window)[1][:, :, -1]
        assert_close(y[:, :, -1], expected.repeat_interleave(heads[0] // heads[1], dim=1))


@given(seeds, lengths)
def test_cache_counts_slots_and_bytes(seed, T):
    config = config_of((8, 2), n_layer=1)
    q, k, v, alpha, omega = (x.float() for x in qkv(seed, (8, 2), T))
    cache = Cache(config, 2)
    assert cache.compression_ratio == 1.0 and cache.bytes.used == 0
    cache.attend(0, q, k, v, alpha, omega)
    slots = (1 - alpha).sum().item()
    assert cache.compression_ratio == pytest.approx(alpha.numel() / slots)
    assert cache.bytes.used == slots * 2 * 8 * 4
    longest = (1 - alpha).sum(-1).max().item() if T > 1 else 32     # a single token already makes room for more
    state = 2 * 2 * 12 * (2 * 8 + 1) * 4                        # k, v, omega of the last 12 tokens, B = G = 2
    assert cache.bytes.allocated == 2 * 2 * longest * 2 * 8 * 4 + state
    for _ in range(5):
        cache.attend(0, *(x[:, :, -1:] for x in (q, k, v, alpha, omega)))
    assert cache.bytes.used <= cache.bytes.allocated - state


# ------------------------------------------------------------------------------------------------ the whole model

@both
@given(seeds, groups, st.booleans(), st.sampled_from([1, 2, 11]))
def test_without_decisions_it_is_a_plain_llama(ops, seed, heads, tied, T):
    model = model_of(seed, heads, dmc=False, tie_embeddings=tied, rope_theta=500.0, ops=ops)
    tokens = torch.randint(0, 29, (2, T))
    logits, alpha = model(tokens)
    assert alpha is None
    cached, cache = through_cache(model, tokens, 4)
    for b in range(2):
        expected = torch.from_numpy(literal_llama(model, tokens[b].numpy()))
        assert_close(logits[b], expected, 1e-9 * expected.abs().max())
        assert_close(cached[b], expected, 1e-9 * expected.abs().max())
    assert (cache.lengths == T).all() and cache.compression_ratio == 1


@both
@given(seeds, groups, lengths, windows, st.integers(1, 8))
def test_central_claim_for_the_models_own_decisions(ops, seed, heads, T, window, split):
    """With alpha in {0, 1} the training form equals the cache, for every position of the whole model."""
    model = model_of(seed, heads, window, ops=ops)
    tokens = torch.randint(0, 29, (2, T))
    logits, alpha = model(tokens)
    for portions in (1, split):
        cached, cache = through_cache(model, tokens, portions)
        assert_close(cached, logits, 1e-9)
        assert (cache.lengths == (1 - alpha).sum(-1)).all()
    assert T < 13 or 0.05 < alpha.mean() < 0.95


@both
@given(seeds, groups, lengths, windows, st.integers(1, 8), st.floats(0, 1))
def test_central_claim_for_random_decisions(ops, seed, heads, T, window, split, merge):
    model = model_of(seed, heads, window, ops=ops)
    L, G = model.config.n_layer, heads[1]
    script = (torch.rand(L, 2, G, T, generator=torch.Generator().manual_seed(seed)) < merge).double()
    script[..., 0] = 0

    def scripted():
        done = [0] * L

        def decide(logit, config, noise, start=True):
            layer = done.index(min(done))                        # layers are asked in turn
            at = slice(done[layer], done[layer] + logit.size(-1))
            done[layer] = at.stop
            return script[layer, ..., at], torch.log1p(-script[layer, ..., at])
        return decide

    tokens = torch.randint(0, 29, (2, T))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmc, "relaxed_decision", scripted())
        logits, alpha = model(tokens)
        assert (alpha == script).all()
        patch.setattr(dmc, "relaxed_decision", scripted())
        cached, cache = through_cache(model, tokens, split)
    assert_close(cached, logits, 1e-9)
    assert (cache.lengths == (1 - script).sum(-1)).all()


@both
@given(seeds, groups, windows, st.integers(1, 15))
def test_a_later_token_never_changes_an_earlier_output(ops, seed, heads, window, at):
    model = model_of(seed, heads, window, ops=ops)
    tokens = torch.randint(0, 29, (1, 16))
    changed = tokens.clone()
    changed[:, at:] = (changed[:, at:] + 1 + torch.randint(0, 27, (16 - at,))) % 29
    for noise in (False, True):
        logits = []
        for x in (tokens, changed):
            torch.manual_seed(seed)                              # the same noise for both
            logits.append(model(x, noise=noise)[0][:, :at])
        assert_close(*logits)


@both
def test_every_parameter_learns_from_both_losses(ops):
    model = model_of(0, (8, 2), c=0.0, tau=1.0, ops=ops)
    tokens = torch.randint(0, 29, (2, 12))
    logits, alpha = model(tokens, noise=True)
    (F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + dmc.compression_loss(alpha, 8)).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
    for row in (p.grad[::8] for layer in model.layers for p in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)):
        assert row.abs().sum() > 0


@both
def test_misuse_is_refused(ops):
    model = model_of(0, ops=ops)
    with pytest.raises(InputError, match="65 tokens do not fit"):
        model(torch.zeros(1, 65, dtype=torch.long))
    cache = ops.Cache(model.config, 1, dtype=torch.float64)
    model(torch.zeros(1, 60, dtype=torch.long), cache)
    with pytest.raises(InputError, match="positions"):
        model(torch.zeros(1, 5, dtype=torch.long), cache)
    for bad in (dict(noise=True), dict(gain=1.0), dict(gain=0.5)):
        with pytest.raises(ValueError, match="a cache works with"):
            model(torch.zeros(1, 1, dtype=torch.long), cache, **bad)


@pytest.mark.parametrize("bad", [dict(n_kv_head=3), dict(dim=30, head_dim=None), dict(head_dim=7), dict(n_layer=0),
                                 dict(window=0), dict(tau=0.0), dict(head_dim=2)])
def test_impossible_configurations_are_refused(bad):
    with pytest.raises(InputError):
        config_of(**bad)


# ------------------------------------------------------------------------------------------------ files and text

@given(st.text())
def test_byte_tokenizer_round_trip(text):
    tokenizer = dmc.Tokenizer.bytes()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode() and tokenizer.decode(ids) == text and tokenizer.eos not in ids


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_are_bit_exact(tmp_path, tied):
    model = Transformer(config_of((8, 2), window=None, tie_embeddings=tied))
    dmc.save(model, tmp_path / "a", phase="solidify", cr=3.9)
    again = dmc.load(tmp_path / "a")
    assert again.config == model.config
    tokens = torch.randint(0, 29, (2, 9))
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    facts = json.loads((tmp_path / "a/config.json").read_text())
    assert facts["dmc"] == {"method": "dmc", "window": None, "tau": 0.1, "c": 0.5, "phase": "solidify", "cr": 3.9}
    assert facts["model_type"] == "dmc_llama"
    assert dmc.load(tmp_path / "a", dmc=False).config.dmc is False


@pytest.mark.parametrize("dies_in", ["save_file", "replace", "second file"])
def test_a_kill_during_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, dies_in):
    old, new = Transformer(config_of()), Transformer(config_of(n_layer=1))
    dmc.save(old, tmp_path)

    def half_a_file(weights, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    def die(*_):
        raise KeyboardInterrupt

    if dies_in == "save_file":
        monkeypatch.setattr(dmc, "save_file", half_a_file)
    elif dies_in == "replace":
        monkeypatch.setattr(Path, "replace", die)
    else:
        monkeypatch.setattr(Path, "write_text", die)
    with pytest.raises(KeyboardInterrupt):
        dmc.save(new, tmp_path)
    monkeypatch.undo()
    survivor = new if dies_in == "second file" else old          # whole, either way
    with pytest.warns(UserWarning, match="differs") if survivor is new else contextlib.nullcontext():
        loaded = dmc.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), survivor.parameters(), strict=True))


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def full(temporary):
        temporary.write_text("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        dmc.write_atomically(path, full)
    assert path.read_text() == "old"


@pytest.mark.filterwarnings("ignore")        # of a damaged copy of the configuration
@given(st.integers(0, 10 ** 6), st.integers(0, 255))
def test_damaged_checkpoints_are_refused_in_a_sentence(tmp_path_factory, at, byte):
    folder = tmp_path_factory.mktemp("damaged")
    dmc.save(Transformer(config_of(n_layer=1)), folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:at % len(data)])
    with pytest.raises(InputError, match="truncated"):
        dmc.load(folder)
    if data[at % header] != byte:
        data[at % header] = byte                                 # a flipped byte in the header: refused, or harmless
        file.write_bytes(data)
        try:
            dmc.load(folder)
        except InputError as error:
            assert "\n" not in str(error)


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    model = Transformer(config_of(n_layer=1))
    model.lm_head = torch.nn.Linear(16, 28, bias=False)
    dmc.save(model, tmp_path)
    with pytest.raises(InputError, match="lm_head.weight"):
        dmc.load(tmp_path)


# ------------------------------------------------------------------------------------------------ training

@pytest.fixture(scope="session", autouse=True)
def cache_of_tokens(tmp_path_factory):
    """Where runs keep tokenized text, instead of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["XDG_CACHE_HOME"]) / "dmc"


TINY = ["--layers", "1", "--heads", "2", "--kv-heads", "1", "--dim", "8", "--ffn-dim", "8", "--context", "16", "--batch", "2",
        "--pretrain-steps", "6", "--free-steps", "3", "--retrofit-steps", "5", "--solidify-steps", "3", "--cr", "3",
        "--keep", "2", "3", "--eval-sequences", "4", "--save-every", "4", "--log-every", "3", "--warmup", "2", "--c", "0"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(f"{i} times {i + 1} is {i * (i + 1)}, as everyone knows." for i in range(300)))
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main(["--out", str(out), "--data", text, *TINY]) == 0
    return out


def curve(out):
    """The lines of metrics.jsonl without what a clock or the machine has a part in."""
    entries = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in e.items() if key not in ("tokens_per_second", "mfu", "peak_gb")} for e in entries]


def summary(out):
    return {key: value for key, value in json.loads((Path(out) / "summary.json").read_text()).items()
            if key not in ("seconds", "command")}


def test_a_run_yields_its_models_and_its_table(finished, capsys):
    result = json.loads((finished / "summary.json").read_text())
    assert [entry["target"] for entry in result["dmc"]] == [2, 3]
    for entry in result["dmc"]:
        assert 1 <= entry["cr"] <= 16 and math.isfinite(entry["loss"]) and len(entry["heads"]) == 1
    assert result["seconds"] > 0 and result["versions"]["torch"] == torch.__version__
    entries = curve(finished)
    steps = {"pretrain": 6, "free": 3, "retrofit": 5, "solidify": 6 + 3, "control": 11}
    assert {name: sum(e["phase"] == name for e in entries) for name in steps} == steps
    assert [e["target_cr"] for e in entries if e["phase"] == "retrofit"] == pytest.approx([1.4, 1.8, 2.2, 2.6, 3.0])
    assert train.main(["--out", str(finished), "--resume"]) == 0          # a finished run only shows its table again
    shown = capsys.readouterr().out
    assert "DMC 3x" in shown and "head 0" in shown and "control" in shown
    assert not any(row.any() for row in dmc.load(finished / "freed").control_rows())
    assert any(row.any() for row in dmc.load(finished / "cr3").control_rows())
    assert not dmc.load(finished / "control").config.dmc and dmc.load(finished / "cr2").config.dmc


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert train.provenance()["commit"] is None


def test_every_track_of_a_run_reads_the_same_data(tmp_path, text):
    positions = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batch", lambda tokens, s, position, device, rows, batch=train.batch:
                      positions.append(position) or batch(tokens, s, position, device, rows))
        assert train.main(["--out", str(tmp_path / "run"), "--data", text, *TINY]) == 0
    assert positions[:14] == list(range(14))                     # pretrain, free, retrofit
    assert positions[14:20] == list(range(11, 17))               # solidify at CR 2, left after step 2 of 5
    assert positions[20:23] == [14, 15, 16] and positions[23:] == list(range(6, 17))


@given(died_at=st.integers(0, 30), again_at=st.integers(0, 30))
@settings(max_examples=4)
def test_resume_is_bit_identical(tmp_path_factory, finished, text, died_at, again_at):
    """Die before any step, twice; the curve, the weights and the table come out as if nothing had happened."""
    out = tmp_path_factory.mktemp("killed") / "run"
    arguments = ["--out", str(out)]
    step = train.train_step
    for at in (died_at, again_at):
        with pytest.MonkeyPatch.context() as patch:
            calls = iter(range(100))

            def dying_step(*args, at=at, calls=calls):
                if next(calls) == at:
                    raise RuntimeError("power cut")
                return step(*args)

            patch.setattr(train, "train_step", dying_step)
            with contextlib.suppress(RuntimeError):
                train.main([*arguments, "--resume"] if out.exists() else [*arguments, "--data", text, *TINY])
    assert train.main([*arguments, "--resume"]) == 0
    assert curve(out) == curve(finished)
    ours, theirs = summary(out), summary(finished)
    assert {k: ours[k] for k in ("pretrained", "control", "dmc")} == {k: theirs[k] for k in ("pretrained", "control", "dmc")}
    ours, theirs = (dmc.load(run / "cr3").state_dict() for run in (out, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_resumes(tmp_path, finished, text, signal_number):
    out, delay = tmp_path / "run", np.random.default_rng().uniform(0, 1.5)
    command = [sys.executable, HERE / "train.py", "--out", out]
    process = subprocess.Popen([*command, "--data", text, *TINY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal_number)
    printed = process.communicate(timeout=60)[0]
    if signal_number == signal.SIGTERM and not (out / "summary.json").exists():       # it was not finished before
        assert process.returncode == 130 and f"train.py --resume --out {out}" in printed
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert curve(out) == curve(finished), f"{delay} s after the start"


class PowerCut(BaseException):
    pass


def dies(*args, **kwargs):
    raise PowerCut


SAVING_STOPS = {"before the tensors": ("dcp.save", False), "behind the tensors": ("dcp.save", True),
                "before the old one goes": ("shutil.rmtree", False), "behind it": ("shutil.rmtree", True)}


@pytest.mark.parametrize("moment", SAVING_STOPS)
def test_a_kill_while_saving_leaves_a_whole_state(tmp_path, finished, text, moment):
    """The second state of a phase, so that there is an old one."""
    (module, _, name), behind = SAVING_STOPS[moment][0].partition("."), SAVING_STOPS[moment][1]
    out, calls, real = tmp_path / "run", iter(range(100)), getattr(getattr(train, module), name)

    def cut(*args, **kwargs):
        last = next(calls) == (2 if name == "save" else 0)
        result = real(*args, **kwargs) if behind or not last else None
        return dies() if last else result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(getattr(train, module), name, cut)
        train.main(["--out", str(out), "--data", text, *TINY, "--save-every", "2"])
    assert train.main(["--out", str(out), "--resume", "--save-every", "4"]) == 0
    assert curve(out) == curve(finished) and not list(out.glob("state-*"))


def interrupted(out, text, interrupt, arguments=(), at=5):
    """A run in which interrupt(model) is called before step `at`. Returns its exit code."""
    step, calls = train.train_step, iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", lambda model, *args: (next(calls) == at and interrupt(model), step(model, *args))[1])
        return train.main(["--out", str(out), "--data", text, *TINY, *arguments])


def test_no_number_for_a_loss_stops_the_run_and_keeps_the_state(tmp_path, finished, text, capsys):
    assert interrupted(tmp_path / "first", text, lambda model: model.norm.weight.data.fill_(math.nan), at=0) == 2
    assert "before step 0 of pretrain" in capsys.readouterr().err
    out = tmp_path / "run"
    assert interrupted(out, text, lambda model: model.norm.weight.data.fill_(math.nan)) == 2
    said = capsys.readouterr().err
    assert "the loss is nan" in said and "step 5 of pretrain, batch 5" in said and "before step 4 of pretrain" in said
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert curve(out) == curve(finished)


def test_resume_may_lower_the_learning_rate(tmp_path, text):
    out = tmp_path / "run"
    assert interrupted(out, text, lambda model: model.norm.weight.data.fill_(math.nan)) == 2
    assert train.main(["--out", str(out), "--resume", "--lr", "1e-4"]) == 0
    assert json.loads((out / "run.json").read_text())["settings"]["lr"] == 1e-4
    assert {e["lr"] for e in curve(out) if e["phase"] == "retrofit"} == {5e-5, 1e-4}


def test_a_full_disk_while_saving_keeps_the_state(tmp_path, finished, text, capsys):
    """No file may grow beyond 20 KB, less than a state: the kernel refuses, as on a full disk."""
    out, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        code = interrupted(out, text, lambda model: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)),
                           ["--save-every", "2"], at=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert code == 2 and "cannot be written" in said and "File too large" in said and "Traceback" not in said
    assert json.loads((out / "state.json").read_text())["step"] == 2
    assert [folder.name for folder in out.glob("state-*")] == ["state-0-2"]          # what did not fit makes room
    assert train.main(["--out", str(out), "--resume", "--save-every", "4"]) == 0
    assert curve(out) == curve(finished)


LEAN = ["--precision", "bf16", "--micro-batch", "1"]
SHORT = ["--pretrain-steps", "2", "--keep", "3", "--solidify-steps", "1"]


def test_a_scheduler_stops_a_run_between_two_passes(tmp_path, text, capsys):
    """In bf16, where the noise of the rounding comes out the same too."""
    whole, out, calls, batch = tmp_path / "whole", tmp_path / "run", iter(range(100)), train.batch
    with single_threaded():
        assert train.main(["--out", str(whole), "--data", text, *TINY, *SHORT, *LEAN]) == 0

    def asked(*args):
        if next(calls) == 12:                     # the first half of the retrofit's step 1
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(*args)

    with pytest.MonkeyPatch.context() as patch, single_threaded():
        patch.setattr(train, "batch", asked)
        assert train.main(["--out", str(out), "--data", text, *TINY, *SHORT, *LEAN]) == 130
    assert f"--resume --out {out}" in capsys.readouterr().out
    state = json.loads((out / "state.json").read_text())
    assert (state["phase"], state["step"]) == (2, 1)
    assert train.main(["--out", str(out), "--resume"]) == 0
    assert curve(out) == curve(whole)
    ours, theirs = (dmc.load(run / "cr3").state_dict() for run in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


TWO_PROCESSES = """
import sys, torch, train
calls, step = iter(range(100)), train.train_step
def dying_step(*args):
    if next(calls) == 7:
        raise RuntimeError("power cut")
    return step(*args)
train.train_step = dying_step
torch.set_num_threads(1)
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_processes_train_like_one_and_resume_each_others_state(tmp_path, text):
    """One process into the retrofit; two, with FSDP2 over gloo, through solidify into the control; then one again."""
    arguments = ["--data", text, *TINY, *SHORT, "--save-every", "2", "--kv-heads", "2", "--dim", "12", "--micro-batch", "1"]
    whole, out, script = tmp_path / "whole", tmp_path / "run", tmp_path / "two.py"
    assert train.main(["--out", str(whole), *arguments]) == 0
    with pytest.raises(PowerCut):
        interrupted(out, text, dies, arguments[2:], at=8)
    assert json.loads((out / "state.json").read_text())["tensors"] == "state-2-2"
    script.write_text(TWO_PROCESSES)
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
                          "--resume", "--out", str(out)], capture_output=True, text=True, timeout=120,
                         env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    state = json.loads((out / "state.json").read_text())
    assert "power cut" in two.stderr and state["tensors"] == "state-4-2", two.stderr
    assert train.main(["--out", str(out), "--resume"]) == 0
    for ours, theirs in zip(curve(out), curve(whole), strict=True):
        assert ours["phase"] == theirs["phase"] and ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5) and ours["cr"] == pytest.approx(theirs["cr"], abs=1e-4)
    for ours, theirs in zip(summary(out)["dmc"], summary(whole)["dmc"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_control_rows_take_larger_steps_and_nothing_else_does():
    s = train.Settings(layers=1, heads=4, kv_heads=2, dim=16, ffn_dim=16, context=16, channel_lr_factor=10.0)
    phase = train.plan(s)[2]
    moved = []
    for factor in (1.0, 10.0):
        torch.manual_seed(0)
        model = Transformer(train.replace(s.small_config(), **s.method(dmc=True)))
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = train.new_optimizer(model, s)
        x = torch.randint(0, 257, (2, 17))
        changed = train.Settings(**{**train.asdict(s), "channel_lr_factor": factor})
        train.train_step(model, optimizer, phase, 0, [(1, x[:, :-1], x[:, 1:])], changed)
        moved.append({name: p.detach() - start[name] for name, p in model.named_parameters()})
    for name in moved[0]:
        slow, fast = moved[0][name], moved[1][name]
        rows = torch.zeros(len(slow), dtype=torch.bool)
        if "q_proj" in name or "k_proj" in name:
            rows[::4] = True
        assert torch.equal(slow[~rows], fast[~rows])
        assert torch.allclose(10 * slow[rows], fast[rows], rtol=1e-3, atol=1e-6)
        assert not rows.any() or slow[rows].abs().sum() > 0


def test_the_models_of_a_run_see_the_same_batches():
    """The control and every kept model end after as many steps, at the same place of the same data."""
    s = train.Settings()
    control = train.plan(s)[-1]
    solidified = [p for p in train.plan(s) if p.name == "solidify"]
    assert control.name == "control" and control.position == s.pretrain_steps and len(solidified) == 3
    assert {p.position + p.steps for p in solidified} == {control.position + control.steps}
    tokens = np.arange(1000, dtype=np.uint16)
    a, b = (train.batch(tokens, s, 7, "cpu") for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[0][:, 1:], a[1][:, :-1])
    assert not torch.equal(a[0], train.batch(tokens, s, 8, "cpu")[0])


def test_learning_rates_and_targets():
    pretrain, free, retrofit, solidify = train.plan(train.Settings(warmup=10))[:4]
    assert pretrain.learning_rate(0, 10) == pytest.approx(pretrain.lr / 10)
    assert pretrain.learning_rate(pretrain.steps, 10) == pytest.approx(pretrain.lr / 10)
    assert retrofit.learning_rate(100, 10) == retrofit.learning_rate(retrofit.steps - 1, 10) == retrofit.lr
    assert retrofit.target(retrofit.steps - 1) == 4 and solidify.target(0) == 2
    assert pretrain.target(0) is None and free.target(0) is None


@given(seeds, st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=10)
def test_pooling_averages_every_n_tokens(seed, every, split):
    config = config_of(dmc=False)
    q, k, v, _, _ = qkv(seed, (4, 4), 13)
    cache = train.pooling_cache(Cache, every)(config, 2, dtype=torch.float64)
    y = torch.cat([cache.attend(0, *part) for part in zip(*(x.split(split, dim=2) for x in (q, k, v)), strict=True)], dim=2)
    fixed = (np.arange(13) % every > 0).astype(float)
    for b, h in np.ndindex(2, 4):
        expected, slots = literal_algorithm1(q[b, h:h + 1].numpy(), k[b, h].numpy(), v[b, h].numpy(), fixed, np.ones(13), 12,
                                             config.rope_theta, silent=False)
        assert_close(y[b, h:h + 1], torch.from_numpy(expected))
        assert cache.lengths[0, b, h] == slots == math.ceil(13 / every)


def test_evaluation_is_the_loss_through_the_cache_token_by_token():
    s = train.Settings(layers=2, heads=2, kv_heads=1, dim=16, ffn_dim=16, context=16, eval_sequences=3)
    torch.manual_seed(0)
    model = Transformer(train.replace(s.small_config(), **s.method(dmc=True)))
    with torch.no_grad():
        for row in model.control_rows():
            row.normal_(std=3.0)
    tokens = np.random.default_rng(0).integers(0, 257, 3 * 16 + 1).astype(np.uint16)
    loss, cr, heads = train.evaluate(model, tokens, s)
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


def test_training_text_is_split_by_file(tmp_path):
    files = []
    for i in range(40):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(chr(65 + i) * 100)
    train_tokens, val_tokens, _ = train.load_data(train.Settings(data=[str(f) for f in files], context=16), None)
    train_tokens, val_tokens = (text[0:len(text)] for text in (train_tokens, val_tokens))
    assert len(train_tokens) == 38 * 101 and len(val_tokens) == 2 * 101
    assert not (set(train_tokens) & set(val_tokens)) - {256}


# ------------------------------------------------------------------------------------------------ text for training

WORDS = ["def ", "merge", "\n", "é", "🙂", " ", "append\n\n", "\x0c", "a\x0cb\n", '"', "\\"]
TEXTS_OF_FILES = st.lists(st.lists(st.sampled_from(WORDS), max_size=30).map("".join), min_size=1, max_size=12)


def data_settings(*paths, **changes):
    return train.Settings(**{"data": [str(p) for p in paths], "context": 4, "batch": 2, **changes})


def write_packed(path, text):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8", newline="") as f:
        f.write(text)
    return path


@given(TEXTS_OF_FILES, st.sampled_from(["", ".gz", ".xz"]), st.sampled_from([".txt", ".jsonl", ".py"]))
def test_every_form_of_text_gives_the_same_documents(tmp_path_factory, texts, packed, kind):
    folder = tmp_path_factory.mktemp("forms")
    texts = [text for text in texts if "\n\x0c\n" not in f"\n{text}\n"]
    if kind == ".txt":
        ended = [text if text.endswith("\n") or not text else text + "\n" for text in texts]
        path = write_packed(folder / f"f.txt{packed}", "\x0c\n".join(ended))
        texts = ended or [""]
    elif kind == ".jsonl":
        lines = "".join(json.dumps({"id": 1, "body": text}) + "\n\n" for text in texts)
        path = write_packed(folder / f"f.jsonl{packed}", lines)
    else:
        texts = ["\x0c\n".join(texts)]
        path = write_packed(folder / f"f.py{packed}", texts[0])
    assert [text for text, _ in train.documents(path, "body")] == texts


def test_zst_is_read_where_its_library_is(tmp_path, monkeypatch):
    zstandard = oracle("zstandard")
    path, packed = tmp_path / "f.txt.zst", zstandard.compress(b"one\n\x0c\ntwo\n" * 1000)
    path.write_bytes(packed)
    assert [text for text, _ in train.documents(path, "text")] == ["one\n", *["two\none\n"] * 999, "two\n"]
    path.write_bytes(packed[:4] + bytes(9) + packed[13:])
    with pytest.raises(InputError, match="damaged"):
        list(train.documents(path, "text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="pip install zstandard"):
        next(train.documents(path, "text"))


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_a_text_is_its_documents_in_order(seed, sizes, data):
    rng = np.random.default_rng(seed)
    tokens, ends = rng.integers(0, 1000, sum(sizes)), np.cumsum(sizes)
    order = rng.permutation(len(sizes))
    whole = np.concatenate([tokens[ends[i] - sizes[i]:ends[i]] for i in order])
    text = train.Text(tokens, (ends - sizes)[order], ends[order])
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole) + 3))
    assert len(text) == len(whole) and np.array_equal(text[start:stop], whole[start:stop])


def test_each_sequence_is_read_once_per_round_and_validation_never(tmp_path):
    """Documents of one repeated byte each: what a batch holds shows where it is from."""
    path = tmp_path / "f.txt"
    path.write_bytes(b"\x0c\n".join(bytes([32 + i]) * (20 + i) + b"\n" for i in range(60)))
    s = data_settings(path)
    train_text, val_text, key = train.load_data(s, None)
    held_out = set(val_text[0:len(val_text)].tolist()) - {10, 256}
    assert len(held_out) == 3
    n = (len(train_text) - 1) // 4
    read = [train.batch(train_text, s, position, "cpu")[0].tolist() for position in range(n)]          # two rounds
    rows = [tuple(row) for rows in read for row in rows]
    in_order = sorted(tuple(train_text[i * 4:i * 4 + 4].tolist()) for i in range(n))
    assert sorted(rows[:n]) == sorted(rows[n:]) == in_order and rows[:n] != rows[n:] != in_order
    assert not held_out & {token for row in rows for token in row}
    other = data_settings(path, seed=1)
    assert train.batch(train_text, other, 0, "cpu")[0].tolist() != read[0]
    assert np.array_equal(train.load_data(other, None)[1][0:50], val_text[0:50])                # the same for every seed
    part = train.batch(train_text, s, 3, "cpu", range(1, 2))[0].tolist()
    assert part == read[3][1:]


def test_text_is_tokenized_once_for_its_content(tmp_path, monkeypatch, cache_of_tokens):
    (tmp_path / "folder/below").mkdir(parents=True)
    for i, name in enumerate(["b.txt", "a.txt", "below/c.jsonl"]):
        line = f"text {i}" * 20
        (tmp_path / "folder" / name).write_text(json.dumps({"text": line}) if "json" in name else line)
    first = train.load_data(data_settings(tmp_path / "folder"), None)
    encoded = []
    monkeypatch.setattr(train, "encode", lambda *args, encode=train.encode: encoded.append(args) or encode(*args))
    for pattern in (tmp_path / "folder", tmp_path / "folder/**/*.*"):
        again = train.load_data(data_settings(pattern), None)
        assert again[2] == first[2] and np.array_equal(again[0][0:99], first[0][0:99])
    assert not encoded
    (tmp_path / "folder/a.txt").write_text("text 3" * 20)
    assert train.load_data(data_settings(tmp_path / "folder"), None)[2] != first[2] and encoded
    shutil.rmtree(tmp_path / "folder")
    assert np.array_equal(train.load_data(data_settings(tmp_path / "folder"), None, first[2])[0][0:99], first[0][0:99])
    assert not list(cache_of_tokens.glob("*.partial"))


def test_many_processes_tokenize_like_one(tmp_path):
    paths = [tmp_path / f"{name}.jsonl.gz" for name in "ab"]
    texts = [[f"{name}{i} " * 50_000 for i in range(20)] for name in "ab"]
    for path, part in zip(paths, texts, strict=True):
        with gzip.open(path, "wt", compresslevel=1) as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in part)
    portions = list(train.encode_all(paths, None, "text", alone=0))
    arrays = [tokens for arrays, _ in portions for tokens in arrays]
    shares = [done for _, done in portions]
    assert len(portions) > 4 and shares == sorted(shares) and shares[-1] == 1
    for tokens, text in zip(arrays, texts[0] + texts[1], strict=True):
        assert bytes(tokens[:-1].astype(np.uint8)).decode() == text and tokens[-1] == 256


BAD_DATA = {
    "no such pattern": (None, "", "no such file"),
    "damaged gzip": ("f.txt.gz", b"\x1f\x8b\x08\x00aaaaaaaaaa", "damaged"),
    "cut gzip": ("f.txt.gz", gzip.compress(os.urandom(9999).hex().encode())[:5000], "damaged"),
    "no gzip": ("f.txt.gz", b"plain text", "cannot be read"),
    "damaged xz": ("f.txt.xz", lzma.compress(os.urandom(9999).hex().encode())[:5000], "damaged"),
    "no xz": ("f.txt.xz", b"plain text", "damaged"),
    "no UTF-8": ("f.jsonl", b'{"text": "\xff"}', "not UTF-8"),
    "no JSON": ("f.jsonl", b'{"text": "a"}\n{"text": ', "in line 2"),
    "no such field": ("f.jsonl", b'{"text": "a"}\n{"body": "a"}', "no text under text in line 2"),
    "no object": ("f.jsonl", b"3", "no text under text in line 1"),
    "no text": ("f.jsonl", b'{"text": 3}', "no text under text in line 1"),
    "empty": ("f.txt", b"", "give more text"),
    "an empty folder": ("sub/.hidden", b"x" * 1000, "no file to train on"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_train_refuses_bad_data(tmp_path, monkeypatch, capsys, case, cache_of_tokens):
    name, content, says = BAD_DATA[case]
    monkeypatch.chdir(tmp_path)
    if name:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    given_data = "missing/*" if name is None else "sub" if "/" in name else name
    assert says in refusal(train.main, ["--data", given_data, "--context", "16"], capsys, tmp_path)
    assert not list(cache_of_tokens.glob("*.partial"))


# ------------------------------------------------------------------------------------------------ training in less memory

@given(st.floats(width=32, allow_subnormal=False, max_value=2.0 ** 127, min_value=-2.0 ** 127))
def test_stochastic_rounding_is_unbiased(x):
    """Over all noise there is, each value once, the mean is x itself; and nothing but x's two neighbours occurs."""
    bits = torch.arange(2 ** 16, dtype=torch.int32)
    rounded = train.round_stochastically(torch.full((2 ** 16,), x), bits - 2 ** 20).double()
    assert rounded.mean().item() == x
    assert (rounded - x).abs().max() <= max(abs(x) * 2.0 ** -7, 2.0 ** -133)
    kept = rounded[:1].float()
    assert torch.equal(train.round_stochastically(kept, bits[-1:]).float(), kept)       # bf16 stays bf16


def test_stochastic_rounding_keeps_what_is_no_number():
    x = torch.tensor([math.inf, -math.inf, math.nan])
    rounded = train.round_stochastically(x, torch.full((3,), -1, dtype=torch.int32))
    assert rounded[0] == math.inf and rounded[1] == -math.inf and rounded[2].isnan()


def steps_of_adamw(model, gradients, **settings):
    optimizer = train.new_optimizer(model, train.Settings(clip=0.5, **settings))
    for gradient in gradients:
        optimizer.zero_grad()
        for p, g in zip(model.parameters(), gradient, strict=True):
            p.grad = g.to(p.dtype).contiguous()
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        if settings.get("precision") == "bf16":
            optimizer.clip(0.5)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return optimizer


def test_rounding_adamw_is_adamw_on_average(monkeypatch):
    """Three steps, many times over: the mean of weights and moments is what fp64 AdamW makes of the same gradients."""
    monkeypatch.setattr(train.RoundingAdamW, "CHUNK", 1000)          # cuts through the copies
    copies, size = 4096, 7                                           # sqrt(4096) is exact in bf16
    torch.manual_seed(0)
    start, gradients = torch.randn(size).bfloat16(), torch.randn(3, 1, size).bfloat16()
    exact = torch.nn.Linear(size, 1, bias=False).double()
    many = torch.nn.Linear(size, copies, bias=False).bfloat16()
    with torch.no_grad():
        exact.weight.copy_(start[None])
        many.weight.copy_(start.expand(copies, size))
    moments = steps_of_adamw(exact, gradients[:, None], weight_decay=0.5, beta2=0.9).state[exact.weight]
    shrunk = gradients * copies ** -0.5                              # so that the norm, and so the clipping, is the same
    state = steps_of_adamw(many, shrunk.expand(3, copies, size)[:, None], precision="bf16", weight_decay=0.5, beta2=0.9,
                           eps=1e-8 * copies ** -0.5).state[many.weight]
    scale = copies ** 0.5
    for ours, theirs, unit in ((many.weight, exact.weight, 1.0), (state["exp_avg"], moments["exp_avg"], scale),
                               (state["exp_avg_sq"], moments["exp_avg_sq"], copies)):
        ours, theirs = ours.detach().double() * unit, theirs.detach()[0]
        error = (ours.mean(0) - theirs).abs()
        assert (ours.std(0) > 0).any() and (error < 5 * ours.std(0) / scale + 1e-4 * theirs.abs()).all()


def test_gradients_of_many_passes_add_up_in_fp32():
    """Against the exact sum of the passes' bf16 gradients; a bf16 sum, which is what .grad holds, is far off."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, bias=False).bfloat16()
    passes = torch.randn(300, 4, 8).bfloat16() + 1
    gradients = [torch.autograd.grad(model(x).sum(), model.weight)[0].double() for x in passes]
    for x in passes:
        model(x).sum().backward()
    rough = model.weight.grad.double()
    optimizer = train.new_optimizer(model, train.Settings(precision="bf16"), passes=300)
    optimizer.zero_grad()
    for x in passes:
        model(x).sum().backward()
    exact = sum(gradients)
    error = lambda total: ((total.double() - exact).norm() / exact.norm()).item()
    assert model.weight.grad is None and error(optimizer.gradient(model.weight)) < 1e-6 and error(rough) > 0.01
    assert optimizer.clip(1.0).item() == pytest.approx(exact.norm().item(), rel=1e-5)


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that were made under it, beside the model's own, and still live; their peak; and those of the
    largest. Counts tensors without data, on the device meta, just as well."""

    def __init__(self, model):
        super().__init__()
        self.storages, self.largest, self.live, self.peak = {}, 0, 0, 0
        self.own = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.own | self.storages.keys():
                    self.largest = max(self.largest, storage.nbytes())
                    self.storages[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def gone(self, key):
        self.live -= self.storages.pop(key)


def test_one_activation_per_layer_is_kept_and_no_full_logits():
    kept = []
    tokens = torch.zeros(2, 60, dtype=torch.long)
    for layers in (2, 6):
        model = Transformer(config_of(n_layer=layers, dim=128, vocab_size=1000), dmc_fast).bfloat16()
        head = lambda h, model=model: train.language_loss(model.lm_head, tokens, h, chunk=40)
        with single_threaded(), Allocated(model) as allocated:
            loss, alpha = model(tokens, noise=True, head=head, recompute=True)
            kept.append(allocated.live)
            (loss + alpha.mean()).backward()
        assert allocated.largest <= 1000 * 128 * 2 < 120 * 1000 * 4      # a matrix of weights; all logits in fp32 would be more
    input_of_a_layer, alpha = 2 * 60 * 128 * 2, 2 * 4 * 60 * 4
    assert kept[1] - kept[0] == 4 * (input_of_a_layer + alpha)          # the decisions, once more in the result's stack


@given(seeds, groups, st.sampled_from([1, 7, 64]))
@settings(max_examples=8)
def test_saving_memory_changes_no_loss_and_no_gradient(seed, heads, chunk):
    model, results = model_of(seed, heads), []
    x = torch.randint(0, 29, (2, 14))
    for head in (None, lambda h: train.language_loss(model.lm_head, x[:, 1:], h, chunk)):
        torch.manual_seed(seed)
        out, alpha = model(x[:, :-1], noise=True, head=head, recompute=head is not None)
        loss = out if head else F.cross_entropy(out.float().flatten(0, 1), x[:, 1:].flatten())
        results.append([loss, alpha, *torch.autograd.grad(loss + dmc.compression_loss(alpha, 4), list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-6 * max(1.0, a.abs().max().item()))


def test_any_cut_of_a_batch_gives_the_same_step():
    """Without decisions, whose noise depends on the cut."""
    s = train.Settings(layers=1, heads=2, kv_heads=1, dim=16, ffn_dim=16, context=16, batch=6)
    x, moved = torch.randint(0, 257, (6, 17), generator=torch.Generator().manual_seed(0)), []
    for size in (6, 2, 1):
        torch.manual_seed(0)
        model = Transformer(s.small_config())
        passes = [(6 // size, part[:, :-1], part[:, 1:]) for part in x.split(size)]
        loss, *_ = train.train_step(model, train.new_optimizer(model, s), train.plan(s)[0], 5, passes, s)
        moved.append(torch.cat([torch.tensor([loss]), *(p.detach().flatten() for p in model.parameters())]))
    assert_close(moved[0], moved[1], 1e-5)
    assert_close(moved[0], moved[2], 1e-5)


def test_the_memory_plan_counts_what_stays(tmp_path, text, capsys, monkeypatch):
    for precision, micro_batch in (("fp32", 0), ("bf16", 0), ("bf16", 2)):
        s = train.Settings(precision=precision, micro_batch=micro_batch)
        model = Transformer(s.small_config()).to(s.dtype)
        optimizer = train.new_optimizer(model, s, passes=4 if micro_batch else 1)
        for p in model.parameters():
            p.sum().backward()
        if s.lean:
            optimizer.clip(1.0)
        optimizer.step()
        plan = train.memory_plan(s.small_config(), s)
        moments = sum(entry[key].nbytes for entry in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
        gradients = sum((optimizer.sums[p] if micro_batch else p.grad).nbytes for p in model.parameters())
        assert (plan["weights"], plan["gradients"], plan["moments"]) == (sum(p.nbytes for p in model.parameters()), gradients,
                                                                         moments)
    monkeypatch.chdir(tmp_path)
    told = refusal(train.main, ["--data", text, *TINY, "--memory", "1e-5"], capsys, tmp_path)
    assert "needs" in told and "weights" in told and not (tmp_path / "runs").exists()


class AverageOnMeta(torch.autograd.Function):
    """What the averaging kernels keep and return, without their work."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*(x.contiguous() for x in inputs))
        return tuple(torch.empty_like(x) for x in ctx.to_save[:2])

    @staticmethod
    def backward(ctx, *grads):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def test_the_memory_plan_is_what_a_step_takes():
    """Four layers of Llama 2 7B at 4,096 tokens, on tensors without data: two passes and the update."""
    ops = types.SimpleNamespace(
        Cache=None, accumulate=lambda k, v, alpha, omega, window: AverageOnMeta.apply(k, v, alpha, omega),
        attend=lambda q, k, v, keep: dmc_fast.MaskedFlash.apply(q, k, v, keep, 0.1, "cpu"))
    config = Config(**generate.SHAPES["llama2-7b"] | {"n_layer": 4})
    s = train.Settings(**train.PRESETS["llama2-7b"])
    with torch.device("meta"):
        model = Transformer(config, ops).bfloat16()
    tokens = torch.zeros(1, 4096, dtype=torch.long, device="meta")
    with Allocated(model) as allocated:
        optimizer = train.new_optimizer(model, s, passes=2)
        for _ in range(2):
            head = partial(train.language_loss, model.lm_head, tokens)
            loss, alpha = model(tokens, noise=True, head=head, recompute=True)
            (loss + dmc.compression_loss(alpha, 2)).backward()
            del loss, alpha
        optimizer.clip(1.0)
        optimizer.step()
    taken = allocated.peak + sum(p.nbytes for p in model.parameters())
    planned = sum(train.memory_plan(config, s).values()) - 2e9 * torch.cuda.is_available()
    assert taken < planned < 1.05 * taken


def test_llama2_7b_fits_one_card():
    paper = train.Settings(**train.PRESETS["llama2-7b"])
    plan = train.memory_plan(Config(**generate.SHAPES["llama2-7b"]), paper)
    assert plan["weights"] == 6738415616 * 2 and plan["gradients"] == plan["moments"] == 6738415616 * 4
    assert plan["kept activations"] == 32 * 4096 * 4096 * 2 and sum(plan.values()) + 2e9 < 78e9


def memory_path_curves(steps, passes):
    """Losses of a small model's retrofit: in fp32 with several seeds of the noise, in bf16 with so many passes a step."""
    tokens = np.concatenate([np.frombuffer(f.read_bytes(), dtype=np.uint8) for f in train.standard_library()[:40]])
    small = dict(layers=2, heads=4, kv_heads=2, dim=64, ffn_dim=128, context=64, batch=8, lr=3e-3, c=1.0)
    curves = {}
    for name, noise, count in (*((f"fp32, noise {i}", i, 0) for i in range(3)), *((f"bf16, passes {n}", 0, n) for n in passes)):
        s = train.Settings(**small, precision="bf16" if count else "fp32", micro_batch=8 // count if count else 0)
        phase = train.Phase("retrofit", None, None, steps, 0, 0, s.lr, cr=(1.0, 2.0))
        torch.manual_seed(0)
        model = Transformer(train.replace(s.small_config(), **s.method(dmc=True)), dmc_fast if s.lean else dmc).to(s.dtype)
        optimizer, curves[name] = train.new_optimizer(model, s, passes=count), []
        for step in range(steps):
            torch.manual_seed(10_000 * noise + step)
            parts = (x.split(s.micro_batch or 8) for x in train.batch(tokens, s, step, "cpu"))
            cut = [(count or 1, *part) for part in zip(*parts, strict=True)]
            curves[name].append(train.train_step(model, optimizer, phase, step, cut, s)[0])
    return {name: np.array(losses) for name, losses in curves.items()}


def test_the_memory_saving_path_follows_fp32_within_noise():
    """The distance to fp32, over the last half of the run, is no more than what another seed of the decisions' noise makes.
    DMC_STEPS and DMC_RESULTS: as many steps, and a file for the figures."""
    steps = int(os.environ.get("DMC_STEPS", 20))
    with single_threaded():
        curves = memory_path_curves(steps, passes=(1, 2, 8) if steps > 20 else (2,))
    half = {name: losses[steps // 2:] for name, losses in curves.items()}
    off = {name: losses - half["fp32, noise 0"] for name, losses in half.items()}
    if "DMC_STEPS" in os.environ:
        command = f"DMC_STEPS={steps} DMC_RESULTS=results/precision.json python -m pytest test_dmc.py -k within_noise"
        dmc.write_json(os.environ["DMC_RESULTS"], {
            "steps": steps, "mean loss of the last half": {name: float(x.mean()) for name, x in half.items()},
            "its difference to fp32, noise 0": {name: float(x.mean()) for name, x in off.items()},
            "mean absolute difference per step": {name: float(np.abs(x).mean()) for name, x in off.items()},
            "every 10th loss": {name: x[::10].round(4).tolist() for name, x in curves.items()},
            **generate.provenance(), "command": command})
    assert curves["fp32, noise 0"][0] - half["fp32, noise 0"].mean() > 0.5              # it learns
    noise = max(np.abs(off[f"fp32, noise {i}"]).mean() for i in (1, 2))
    for name in curves:
        assert abs(off[name].mean()) < 2 * noise and np.abs(off[name]).mean() < 2 * noise


@contextlib.contextmanager
def single_threaded():
    """For many small operations, which a second thread only delays."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ watching a run

def test_metrics_have_what_a_plot_needs(finished):
    entries = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert all(e["tokens_per_second"] > 0 and e["peak_gb"] > 0.01 and e["mfu"] is None for e in entries)
    heads = [e for e in entries if "heads" in e]
    assert {e["phase"] for e in heads} == {"retrofit", "solidify"} and len(heads) >= 5
    for e in heads:
        assert 1 / np.mean(1 / np.array(e["heads"])) == pytest.approx(e["cr"], abs=0.01) and np.shape(e["heads"]) == (1, 1)


def test_runs_are_drawn(finished, tmp_path, capsys):
    oracle("matplotlib")
    for name in ("one", "two"):
        shutil.copytree(finished, tmp_path / name)
    assert train.main(["--plot", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    picture = (tmp_path / "one/plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000 and not (tmp_path / "two/plot.png").exists()
    (tmp_path / "two/metrics.jsonl").write_text("")
    assert "no step with decisions" in refusal(train.main, ["--plot", str(tmp_path / "two")], capsys, tmp_path)


def test_a_plot_without_its_library(finished, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refusal(train.main, ["--plot", str(finished)], capsys, tmp_path)


def test_speed_is_measured(tiny_shape, tmp_path, capsys):
    arguments = ["--init", "tiny", "--bench", "4", *LEAN, "--batch", "2", "--context", "16"]
    with single_threaded():
        assert train.main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    for name in ("plain", "dmc"):
        speed, seconds = found[name]["tokens_per_second"], found[name]["seconds_per_step"]
        assert speed * seconds == pytest.approx(2 * 16) and 4 < found[name]["loss"] < 7
    assert "--bench needs" in refusal(train.main, [*arguments[:2], "--bench", "2"], capsys, tmp_path)


def test_model_flops(monkeypatch):
    """Of Llama 2 7B at 4,096 tokens: 6 for each of 6.74 billion parameters, and 12 L dim T / 2."""
    config = Config(**generate.SHAPES["llama2-7b"])
    assert train.flops_per_token(config, 4096) == 6 * 6738415616 + 12 * 32 * 4096 * 4096 // 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert train.flops_share(0.4 * 989e12) == 0.4


def test_presets_are_the_papers(monkeypatch, tmp_path):
    """What stands in EQUATIONS.md's table, in tokens."""
    for name, lr in (("llama2-7b", 3e-5), ("llama2-13b", 3e-5), ("llama2-70b", 1.5e-5)):
        s = train.Settings(**{**train.PRESETS[name], "init": name})
        step = s.batch * s.context
        assert (s.lr, s.tau, s.c, s.window, s.cr_weight, s.precision) == (lr, 0.1, 5, 12, 1, "bf16")
        assert (s.beta2, s.eps, s.weight_decay, s.clip) == (0.95, 1e-5, 0.1, 1)
        assert s.free_steps * step == pytest.approx(1e9, rel=0.05) and s.solidify_steps * step == pytest.approx(8e9, rel=0.05)
        phases = train.plan(s, tmp_path)
        assert [p.name for p in phases] == ["pretrain", "free", "retrofit", "solidify", "solidify", "solidify"]
        assert phases[2].keep == {6000: "retrofit-2", 12000: "retrofit-3", 18000: "retrofit-4"}
        assert 6000 * step == pytest.approx(24e9, rel=0.05) and {p.steps for p in phases[3:]} == {2000}
        assert [phases[2].target(i) for i in (5999, 11999)] == [2, 3]
    chosen = []
    monkeypatch.setattr(train, "Run", lambda s, *_: chosen.append(s) or types.SimpleNamespace(begin=None))
    for arguments in ("--init llama2-70b", "--init x/y", "--init llama2-7b --preset short --keep 2,3"):
        train.open_run(arguments.split())
    assert [(s.lr, s.batch, s.kept()) for s in chosen] == [(1.5e-5, 1024, [2, 3, 4]), (1e-3, 8, [2, 3, 4]), (3e-5, 64, [2, 3])]


# ------------------------------------------------------------------------------------------------ generating

@given(seeds, st.integers(1, 12))
@settings(max_examples=10)
def test_greedy_generation_is_the_parallel_argmax(seed, count):
    """Each token that the cache yields is the likeliest one under a parallel pass over all before it."""
    model = model_of(seed, (8, 2))
    prompt = torch.randint(0, 29, (5,)).tolist()
    cache = Cache(model.config, 1, dtype=torch.float64)
    ids = list(generate.generate(model, cache, prompt, count, lambda x, position: x.argmax().item()))
    everything = prompt + ids
    assert len(ids) == count
    assert model(torch.tensor([everything]))[0][0, 4:-1].argmax(-1).tolist() == ids
    assert cache.seen[0] == len(everything) - 1


def test_generation_stops_before_the_end_of_text():
    model = model_of(0)
    eos = model(torch.tensor([[1, 2]]))[0][0, -1].argmax().item()
    cache = Cache(model.config, 1, dtype=torch.float64)
    assert list(generate.generate(model, cache, [1, 2], 5, lambda x, position: x.argmax().item(), stops=[eos])) == []


def test_sampling_filters():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])

    def ids(n=2000, **changes):
        settings = dict(temperature=1.0, top_k=0, top_p=1.0, seed=0) | changes
        settings = [torch.full((n,), settings[name], dtype=dtype) for name, dtype in generate.SETTINGS.items()]
        return generate.sample(logits.repeat(n, 1), *settings, torch.arange(n)).tolist()
    draw = lambda **changes: set(ids(**changes))
    assert draw() == {0, 1, 2, 3}
    assert draw(top_k=2) == {1, 2} and draw(top_k=1) == {1} and draw(temperature=0) == {1}
    p = logits.softmax(-1)
    assert draw(top_p=p[1].item() - 1e-6) == {1} and draw(top_p=p[1].item() + 1e-6) == {1, 2} and draw(top_p=0.0) == {1}
    for temperature in (1.0, 2.0):
        p, drawn = (logits / temperature).softmax(-1), ids(4000, temperature=temperature)
        for i in range(4):
            assert abs(drawn.count(i) / 4000 - p[i]) < 5 * math.sqrt(p[i] * (1 - p[i]) / 4000)


def literal_distribution(logits, temperature, top_k, top_p):
    """The likeliest tokens and their probabilities, written out: {id: probability}, likeliest first."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k or None]
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in order]
    kept, reached = {}, 0.0
    for i, weight in zip(order, weights, strict=True):
        if kept and reached >= top_p:
            break
        kept[i] = weight / sum(weights)
        reached += kept[i]
    return {i: share / reached for i, share in kept.items()}


@given(seeds, st.integers(0, 10), st.floats(0.0, 1.0, allow_subnormal=False), st.sampled_from([0.1, 1.0, 3.0]),
       st.integers(0, 2 ** 62))
def test_a_batch_is_sampled_as_its_rows_are(seed, top_k, top_p, temperature, first):
    """Every row falls where its own uniform number lies in its own distribution, written out; whatever the others do."""
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(seed)).mul(3).round()          # with equals
    logits[7, 3] = torch.nan
    settings = [torch.full((40,), x, dtype=dtype) for x, dtype in
                zip((temperature, top_k, top_p, 0), generate.SETTINGS.values(), strict=True)]
    settings[0][::4] = 0
    settings[3] += first + torch.arange(40)
    position = torch.arange(40) % 3
    ids = generate.sample(logits, *settings, position).tolist()
    u = generate.uniform(settings[3], position).tolist()
    for i, row in enumerate(logits.tolist()):
        distribution = literal_distribution(row, temperature, top_k, top_p) if i % 4 else {row.index(max(row)): 1.0}
        below = {token: sum(list(distribution.values())[:n]) for n, token in enumerate(distribution)}
        if i == 7:
            assert ids[i] == -1
        else:
            assert ids[i] in distribution
            assert below[ids[i]] - 1e-9 <= u[i] <= below[ids[i]] + distribution[ids[i]] + 1e-9
        assert ids[i] == generate.sample(*(x[i:i + 1] for x in (logits, *settings, position))).item()
    with pytest.raises(InputError, match="not numbers"):
        generate.chooser(temperature=1.0, top_k=0, top_p=1.0, seed=0)(logits[7], 1)


def test_random_numbers_are_uniform_and_independent():
    """Over all seeds and positions, and between neighbours in either: means, spread and correlations of independent numbers."""
    u = generate.uniform(torch.arange(400)[:, None], torch.arange(400)[None])
    assert u.min() >= 0 and u.max() < 1 and u.unique().numel() == u.numel()
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - u.numel() / 20).abs() < 5 * math.sqrt(u.numel() / 20)).all()
    z = (u - 0.5) * math.sqrt(12)
    swapped = (z.T * z)[torch.ones(400, 400).triu(1) > 0]
    for product in (z[1:] * z[:-1], z[:, 1:] * z[:, :-1], z[1:, 1:] * z[:-1, :-1], z[1:, :-1] * z[:-1, 1:], swapped):
        assert abs(product.sum()) < 5 * math.sqrt(product.numel())


def test_segments_are_the_slots_and_spell_the_text(finished):
    model = dmc.load(finished / "cr3")
    with torch.no_grad():
        for row in model.control_rows():
            row.normal_(std=5.0)
    tokenizer = dmc.Tokenizer.bytes()
    text = "naïve “quotes” and 🙂"
    ids = tokenizer.encode(text)
    segments = generate.merged_segments(model, ids, 0, 0)
    assert sum(segments, []) == ids
    slots = 0
    for start in range(0, len(ids), 16):
        cache = Cache(model.config, 1)
        model(torch.tensor([ids[start:start + 16]]), cache)
        slots += cache.lengths[0, 0, 0].item()
    assert len(segments) == slots
    assert generate.show_segments(segments, tokenizer, colour=False).replace("|", "") == text
    assert re.sub(r"\033\[[0-9;]*m", "", generate.show_segments(segments, tokenizer, colour=True)) == text


def test_generate_command(finished, capsys):
    outputs = []
    for extra in ([], [], ["--seed", "1"], ["--cache", "full"]):
        arguments = ["--ckpt", str(finished), "--prompt", "3 tim", "--samples", "2", "--temperature", "1.5", *extra]
        assert generate.main(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith(str(finished / "cr3")) and outputs[0].count("CR per layer") == 2
    assert "never trained to attend without" in outputs[3] and "nothing merged" in outputs[3]
    assert generate.main(["--ckpt", str(finished / "control"), "--prompt", "3", "--tokens", "2", "--cache", "full"]) == 0
    assert "plain model" in capsys.readouterr().out
    assert generate.main(["--ckpt", str(finished / "cr2"), "--prompt", "3 times 4", "--show-merges", "0.0"]) == 0
    shown = capsys.readouterr().out
    assert "layer 0, head 0: 9 tokens" in shown and shown.splitlines()[-1].replace("|", "") == "3 times 4"


PAGE_DATA = re.compile(r'(?<=<script type="application/json" id="data">).*?(?=</script>)', re.DOTALL)
HOSTILE = "naïve </script><!-- & &amp; <b>'\"`${x}\\u003c DATA 🙂\r\n\n\t|\0\u2028end"


def page_segments(page):
    """What the data of a page of --show-merges says: the texts of the segments, by (layer, head)."""
    data = json.loads(PAGE_DATA.search(page)[0])
    L, G, T = data["layers"], data["heads"], len(data["tokens"])
    merges = np.frombuffer(base64.b64decode(data["merges"]), np.uint8).reshape(L, G, -1)
    segments = {}
    for layer in range(L):
        for head in range(G):
            cuts = [t for t in range(T) if not merges[layer, head, t // 8] >> (7 - t % 8) & 1] + [T]
            segments[layer, head] = ["".join(data["tokens"][i:j]) for i, j in zip(cuts, cuts[1:], strict=False)]
    return segments


@given(st.text(min_size=1, max_size=12), st.integers(0, 5))
@example(HOSTILE, 0)
@settings(max_examples=8)
def test_merges_page_holds_the_segments_of_every_head(text, seed):
    """Its data spell the text in as many segments as the cache has slots, those of merged_segments, and stay data. Its tokens
    are bytes, so it takes the model's name to hold </script> in one piece."""
    model, tokenizer = model_of(seed, (4, 2), vocab_size=257, max_seq_len=16), dmc.Tokenizer.bytes()
    ids = tokenizer.encode(text)
    page = generate.merges_page(model, ids, tokenizer, HOSTILE)
    assert PAGE_DATA.sub("DATA", page) == generate.PAGE
    slots = 0
    for start in range(0, len(ids), 16):
        cache = Cache(model.config, 1, dtype=torch.float64)
        model(torch.tensor([ids[start:start + 16]]), cache)
        slots = slots + cache.lengths[:, 0]
    for (layer, head), texts in page_segments(page).items():
        segments = generate.merged_segments(model, ids, layer, head)
        assert "".join(texts) == text and len(texts) == slots[layer, head]
        assert "|".join(texts) == generate.show_segments(segments, tokenizer, colour=False)


def test_merges_page_command(finished, messy_folder, capsys):
    arguments = ["--ckpt", str(finished / "cr2"), "--prompt", HOSTILE, "--show-merges"]
    for name in ("page.html", "folder/again.html"):
        assert generate.main([*arguments, name]) == 0 and name in capsys.readouterr().out
    page = Path("page.html").read_text(encoding="utf-8")
    assert page == Path("folder/again.html").read_text(encoding="utf-8")
    assert "".join(page_segments(page)[0, 0]) == HOSTILE and json.loads(PAGE_DATA.search(page)[0])["positions"] == 16
    Path("occupied.html").mkdir()
    for name in ("occupied.html", "short/page.html"):
        assert f"{name} cannot be written" in refusal(generate.main, [*arguments, name], capsys, messy_folder)
    plain = ["--ckpt", str(finished / "control"), "--show-merges", "page.html"]
    assert "plain model" in refusal(generate.main, plain, capsys, messy_folder)


def test_merges_page_in_a_browser(tmp_path):
    """Headless: the segments that the page shows are those of the head that its address, a click and an arrow key choose."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("there is no chromium or google-chrome to load the page with")
    model, tokenizer = model_of(1, (4, 2), vocab_size=257, max_seq_len=16), dmc.Tokenizer.bytes()
    text = HOSTILE.replace("\r", "").replace("\0", "")          # which no HTML can hold when it is printed again
    page = generate.merges_page(model, tokenizer.encode(text), tokenizer, HOSTILE)
    act = """<script>
        document.body.append(text.cloneNode(true), $("facts").cloneNode(true));
        map.rows[1].cells[2].click();
        map.rows[1].cells[2].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
        </script>"""
    (tmp_path / "page.html").write_text(page + act, encoding="utf-8")
    quiet = [f"--{flag}" for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                                      "disable-background-networking", "disable-component-update")]
    dom = subprocess.run([browser, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                          f"{(tmp_path / 'page.html').as_uri()}#1.0"], capture_output=True, timeout=60).stdout.decode()
    shown = re.findall(r'<div id="text">(.*?)</div>', dom, re.DOTALL)
    facts = re.findall(r'<table id="facts">(.*?)</table>', dom, re.DOTALL)
    expected = page_segments(page)
    for spans, table, head in zip(shown, facts, ((1, 1), (1, 0)), strict=True):             # after acting, before
        texts = [html.unescape(re.sub("<.*?>", "", span)) for span in re.findall("<span.*?>(.*?)</span>", spans, re.DOTALL)]
        assert texts == expected[head] and len(texts) > 2
        assert f"layer {head[0]}, head {head[1]}</td><td>{len(texts)}</td><td>{len(tokenizer.encode(text))}</td>" in table
# ------------------------------------------------------------------------------------------------ many prompts

@pytest.fixture
def one_thread():
    """Steps of tiny models are faster so, by far on a busy machine."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def alone(model, request, stops=(), gain=None):
    """What one request gives by itself through the reference: ids and CR."""
    reference = Transformer(model.config).to(next(model.parameters()).dtype)
    reference.load_state_dict(model.state_dict())
    cache = Cache(model.config, 1, dtype=next(model.parameters()).dtype)
    choose = generate.chooser(**{name: getattr(request, name) for name in generate.SETTINGS})
    ids = list(generate.generate(reference, cache, request.prompt, request.count, choose, stops, gain))
    return ids, cache.compression_ratio


def requests_of(seed, n, prompts=(1, 2, 15, 16, 17, 30), counts=(1, 2, 20, 33, 34)):
    rng = np.random.default_rng(seed)
    return [generate.Request(rng.integers(0, 29, rng.choice(prompts)).tolist(), int(rng.choice(counts)),
                             float(rng.choice([0, 0.5, 1.0])), int(rng.choice([0, 5])), float(rng.choice([0.8, 1.0])),
                             int(rng.integers(100)), key=i) for i in range(n)]


def assert_nothing_is_lost(engine):
    pages = len(engine.cache.free)
    assert engine.cache.left.item() == pages and sorted(engine.cache.free.tolist()) == list(range(pages))
    assert sorted(engine.idle) == list(range(len(engine.tokens))) and not engine.cache.failed.item()


@on_cpu
@given(seeds, st.sampled_from([-0.5, 0.5, 1e9]), st.sampled_from([dmc, dmc_fast]), st.integers(1, 4),
       st.sampled_from([2, 4, 5, 6, 7]), st.sampled_from([None, 3]), st.booleans())
@settings(max_examples=16)
def test_every_request_gets_what_it_gets_alone(one_thread, seed, c, ops, rows, pages, window, greedy):
    """Few rows and pages: requests wait, are admitted, preempted, or too large; each text is as by itself through dmc.py."""
    model = model_of(seed % 20, (4, 1), window, ops, c=c)
    requests, stops = requests_of(seed, 6), [seed % 29]
    for request in requests:
        request.temperature *= not greedy
    engine = generate.Engine(model, rows, 2 * pages, stops)
    results = list(engine.run(requests))
    assert sorted(r.request.key for r in results) == list(range(6))
    for result in results:
        ids, cr = alone(model, result.request, stops)
        if result.error:        # only what might take a page more per head than there is
            assert f"{2 * pages} pages" in result.error and len(result.request.prompt) + len(ids) >= 16 * pages - 1
        else:
            assert result.ids == ids and result.cr == pytest.approx(cr)
            assert result.finish == ("length" if len(ids) == result.request.count else "stop")
    assert_nothing_is_lost(engine)


@on_cpu
@pytest.mark.parametrize("c,pages", [(1e9, 8), (0.5, 6)])
def test_a_full_pool_preempts_the_youngest(one_thread, c, pages):
    """Two that fit one by one, not together: nobody is refused, the older one is never stopped."""
    model = model_of(3, (4, 2), c=c)
    requests = [generate.Request([i], 60 if c > 1 else 50, 1.0, seed=i, key=i) for i in range(2)]
    engine = generate.Engine(model, 2, 2 * pages)
    results = list(engine.run(requests))
    assert engine.preempted > 0 and [r.request.key for r in results] == [0, 1]
    assert all((r.ids, r.cr) == (alone(model, r.request)[0], pytest.approx(alone(model, r.request)[1])) for r in results)
    assert_nothing_is_lost(engine)


@on_cpu
def test_a_preempted_sequence_may_be_larger_than_the_pool_uncompressed(one_thread):
    """What merges fits, though its tokens would not: its prefix is prefilled, and the rest fed token by token."""
    model = model_of(0, (4, 1), c=-1e9)                          # merges everything
    request = generate.Request(list(range(29)) + list(range(20)), 10, 1.0, seed=1)
    engine = generate.Engine(model, 1, 2)
    result, = engine.run([request])
    assert result.ids == alone(model, request)[0] and result.cr == 58 and engine.steps > 30
    assert_nothing_is_lost(engine)


@on_cpu
def test_without_decisions_the_engine_is_a_plain_one(one_thread):
    model = model_of(4, (4, 2))
    requests = requests_of(0, 4)
    engine = generate.Engine(model, 3, 40, gain=0.0)
    for result in engine.run(requests):
        assert (result.ids, result.cr) == (alone(model, result.request, gain=0.0)[0], 1.0)
    plain = generate.Engine(model, 1, 4, gain=0.0)
    with pytest.raises(InputError, match="needs 8 pages of cache, and there are 4"):
        plain.submit(generate.Request([1] * 17, 5))


@on_cpu
def test_cancelled_requests_leave_nothing_behind(one_thread):
    model = model_of(1, (4, 2))
    engine = generate.Engine(model, 2, 32)
    requests = requests_of(5, 5, counts=(20,))
    for request in requests:
        engine.submit(request)
    results = engine.step() + engine.step() + engine.step()
    assert not results and engine.cancel(4) and engine.cancel(0) and not engine.cancel(0)       # one waits, one runs
    results = list(engine.run([]))
    assert sorted(r.request.key for r in results) == [1, 2, 3]
    assert all(r.ids == alone(model, r.request)[0] for r in results)
    for request in requests:
        engine.submit(request)
    leaving = lambda: [seq.request.key for report in engine.pending for seq in report.asked.values()
                       if seq not in engine.running.values()]
    while not leaving():                                         # until one has its last token on the way
        engine.step()
    key = leaving()[0]
    assert engine.cancel(key) and key not in {r.request.key for r in engine.run([])}
    assert_nothing_is_lost(engine)


@on_cpu
def test_what_an_engine_refuses(one_thread):
    model = model_of(0, (4, 2))
    engine = generate.Engine(model, 1, 4)
    with pytest.raises(InputError, match="3 pages for 4 heads"):
        generate.Engine(model, 1, 3)
    for request, words in ((generate.Request([], 1), "empty"), (generate.Request([1] * 64), "64 tokens does not fit"),
                           (generate.Request([1] * 60, 5), "60 tokens and 5 more")):
        result, good = engine.run([request, generate.Request([1], 1)])
        assert words in result.error and len(good.ids) == 1
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    bad, good = sorted(generate.Engine(model, 2, 8).run([generate.Request([7], 3), generate.Request([1, 2], 3, key=1)]),
                       key=lambda r: r.error is None)
    assert "not numbers" in bad.error and (good.error or good.ids == alone(model, good.request)[0])
    assert_nothing_is_lost(engine)


@kernels
def test_the_engine_on_kernels(one_thread):
    """Admission, idle rows and a row that is used again, in the interpreter."""
    torch.manual_seed(0)
    model = Transformer(config_of((2, 1), c=0.0, n_layer=1), dmc_fast).requires_grad_(False)
    requests = [generate.Request([5, 6, 7][:1 + i], 3 + i % 2, 0.5 * i, seed=i, key=i) for i in range(3)]
    engine = generate.Engine(model, 2, 8)
    assert engine.cache.kernels
    for result in engine.run(requests):
        assert (result.ids, result.cr) == (alone(model, result.request)[0], pytest.approx(alone(model, result.request)[1]))
    assert_nothing_is_lost(engine)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("greedy", [True, False])
def test_graphs_replay_what_the_step_does_on_a_gpu(greedy):
    """The same tokens from the engine's graphs as from its step run eagerly, and no wait for the device in between."""
    torch.manual_seed(0)
    model = Transformer(config_of((4, 2), head_dim=16), dmc_fast).cuda().bfloat16()
    results = []
    for eager in (False, True):
        engine = generate.Engine(model, 3, 60)
        for kind in (True, False):
            with torch.no_grad():
                engine.graphs[kind] = engine._capture(kind) if not eager else types.SimpleNamespace(
                    replay=lambda e=engine, k=kind: (setattr(e.cache, "seen", [1] * len(e.cache.seen)), e._step(k)))
        requests = requests_of(1, 8)
        for request in requests:
            request.temperature *= not greedy
        list(engine.run(requests))                               # compiles the prefill's kernels
        results.append({})
        for request in requests:
            engine.submit(request)
        torch.cuda.set_sync_debug_mode("error")
        try:
            while engine.waiting or engine.running or engine.pending:
                results[-1] |= {r.request.key: r.ids for r in engine.step()}
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_nothing_is_lost(engine)
    assert results[0] == results[1] and len(results[0]) == 8


PROMPTS = [
    {"prompt": "1 times"}, {"prompt": "2 ti", "id": "two", "temperature": 0, "tokens": 6},
    "{", "[]", '{"prompt": 3}', {"prompt": ""}, {"prompt": "x" * 17}, {"prompt": "3", "seed": -1}, "",
    {"prompt": "4", "tokens": 1.5}, b"\xff\xfe{", {"prompt": "5", "id": [1]},
    {"prompt": "6", "top_p": "0.5"},
    {"prompt": "7 is", "seed": 3, "top_k": 2, "top_p": 0.5, "tokens": None, "id": 1}, {"prompt": "8", "tokens": 12}]
BAD_LINES = {3: "no JSON", 4: "an object", 5: "an object", 6: "empty", 7: "17 tokens", 8: "seed", 10: "tokens", 11: "no JSON",
             12: "an id", 13: "top_p"}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode()
                                for x in PROMPTS))
    return path


def lines_of(path):
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda line: line["line"])


def prompts_command(finished, prompts, out, *more):
    return ["--ckpt", str(finished), "--prompts", str(prompts), "--out", str(out), "--batch", "3", "--cache-gb", "1e-4", *more]


def test_a_file_of_prompts(finished, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    command = prompts_command(finished, prompts, out, "--temperature", "1.5", "--profile", str(tmp_path / "profile"))
    assert generate.main(command) == 2                           # because of the lines that are at fault
    captured = capsys.readouterr()
    results = {line["line"]: line for line in lines_of(out)}
    assert sorted(results) == [n for n, x in enumerate(PROMPTS, 1) if x]
    assert {n for n, line in results.items() if "error" in line} == set(BAD_LINES)
    for n, words in BAD_LINES.items():
        assert words in results[n]["error"] and f"prompts.jsonl, line {n}: {results[n]['error']}" in captured.err
    assert "10 of the prompts could not be continued" in captured.err.splitlines()[-1] and "Traceback" not in captured.err
    assert "14 requests" in captured.out and "self" in (tmp_path / "profile").read_text().lower()
    assert results[2]["id"] == "two" and results[2]["tokens"] == 6 and results[14]["id"] == 1
    for n in set(results) - set(BAD_LINES):                      # each as the command gives for one prompt
        flags = [x for name in ("temperature", "seed", "top_k", "top_p", "tokens") if PROMPTS[n - 1].get(name) is not None
                 for x in (f"--{name.replace('_', '-')}", str(PROMPTS[n - 1][name]))]
        prompt = PROMPTS[n - 1]["prompt"]
        assert generate.main(["--ckpt", str(finished), "--temperature", "1.5", "--prompt", prompt, *flags]) == 0
        shown = capsys.readouterr().out.split("\n\n", 1)[1]
        assert shown.startswith(prompt + results[n]["text"] + "\n\n")
        assert f"CR {results[n]['cr']:.2f}\n" in shown or results[n]["cr"] == 1
    before = out.read_bytes()
    assert generate.main(command) == 0 and out.read_bytes() == before and "0 requests" in capsys.readouterr().out
    prompts.write_bytes(prompts.read_bytes().replace(b"2 ti", b"2 tu"))
    assert "other prompts than" in refusal(generate.main, command, capsys, tmp_path) and out.read_bytes() == before


def test_a_killed_run_of_prompts_goes_on(finished, tmp_path):
    """SIGKILL at any moment, also in the middle of a line: in the end every result once, the same as without a kill."""
    prompts, outs = tmp_path / "prompts.jsonl", [tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"]
    prompts.write_text("".join(json.dumps({"prompt": f"{i} times", "seed": i, "tokens": 1 + i % 7}) + "\n" for i in range(90)))
    whole, killed = (prompts_command(finished, prompts, out) for out in outs)
    assert generate.main(whole) == 0
    run = subprocess.Popen([sys.executable, HERE / "generate.py", *killed], stdout=subprocess.DEVNULL)
    while run.poll() is None and not (outs[1].exists() and outs[1].read_bytes().count(b"\n") >= 20):
        time.sleep(0.001)
    run.kill()
    run.wait()
    done = lines_of(outs[1])
    assert 20 <= len(done) < 90
    with outs[1].open("ab") as f:
        f.write(outs[0].read_bytes()[:30])                       # half a line
    assert generate.main(killed) == 0
    assert lines_of(outs[1]) == lines_of(outs[0]) and len(lines_of(outs[0])) == 90


# ------------------------------------------------------------------------------------------------ several ranks

RANK_SCRIPT = """
import json, sys, torch
here, folder, out, commands = sys.argv[1:]
sys.path.insert(0, here)
import dmc, dmc_fast, generate
model, rank = generate.load_part(folder, dmc_fast, dtype=torch.float32), generate.this_rank()
tokens, cache = torch.load(f"{out}/tokens.pt"), dmc_fast.PagedCache(model.config, 2)
with torch.no_grad():
    logits, alpha = model(tokens)
    cached = torch.cat([model(part, cache)[0] for part in (tokens[:, :30], *tokens[:, 30:].split(1, dim=1))], dim=1)
torch.save((logits, cached, alpha, sum(p.numel() for p in model.parameters())), f"{out}/rank{rank}.pt")
for command in json.loads(commands):
    assert generate.main(command) == 0
"""


@on_cpu
def test_two_ranks_are_one_model(tmp_path, one_thread, capsys):
    """Logits, decisions, texts and CR of a model split between two processes are the whole one's, also when pages run out."""
    whole, prompts = model_of(3, (4, 2), vocab_size=257), tmp_path / "prompts.jsonl"
    with torch.no_grad():
        for layer in whole.layers:
            layer.self_attn.k_proj.weight[whole.config.head_dim] *= 0            # the second rank's heads merge nothing
    dmc.save(whole, tmp_path / "model", dmc.Tokenizer.bytes())
    prompts.write_text("".join(json.dumps({"prompt": f"{i} times", "seed": i, "temperature": i % 2, "tokens": 16 + i}) + "\n"
                               for i in range(5)))
    flags = ["--ckpt", str(tmp_path / "model"), "--prompt", "2 times", "--tokens", "20"]
    many = [*flags, "--prompts", str(prompts), "--batch", "3", "--cache-gb"]
    commands = [[*flags, "--temperature", "0"], [*flags, "--temperature", "1", "--samples", "2"]]
    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    (tmp_path / "rank.py").write_text(RANK_SCRIPT)
    theirs = json.dumps([*commands, [*many, "1.6e-5", "--out", str(tmp_path / "two.jsonl")]])     # 7 pages for 2 heads
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                          tmp_path / "rank.py", HERE, tmp_path / "model", tmp_path, theirs], capture_output=True, text=True,
                         timeout=120)
    assert run.returncode == 0, run.stderr
    for command in (*commands, [*many, "1", "--out", str(tmp_path / "one.jsonl")]):
        assert generate.main(command) == 0
    shown, ours = run.stdout.splitlines(), capsys.readouterr().out.splitlines()
    assert shown[:-1] == ours[:-1] and "CR per layer" in run.stdout and not re.search(" 0 preempted", shown[-1])
    assert lines_of(tmp_path / "two.jsonl") == lines_of(tmp_path / "one.jsonl") and len(lines_of(tmp_path / "one.jsonl")) == 5
    whole.float()
    with torch.no_grad():
        expected, decided = whole(tokens)
    parts = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    shared = sum(p.numel() for p in whole.layers.parameters() if p.dim() > 1)
    for logits, cached, _, count in parts:
        assert largest_error(logits, expected) < 1e-5 and largest_error(cached, expected) < 1e-5
        assert 2 * (sum(p.numel() for p in whole.parameters()) - count) == shared
    assert torch.equal(parts[0][0], parts[1][0]) and torch.equal(parts[0][1], parts[1][1])
    assert torch.equal(torch.cat([parts[0][2], parts[1][2]], dim=2), decided) and 0 < decided.mean() < 1


@pytest.mark.parametrize("ranks, flags, words", [
    ("4", [], "4 ranks cannot share 2 key-value heads"), ("2", ["--show-merges", "0.0"], "--show-merges looks at all heads"),
    ("2", ["--ckpt", "uneven", "--random-weights"], "2 ranks cannot share 25 columns of the MLPs (ffn_dim)")])
def test_what_ranks_refuse(ranks, flags, words, tmp_path, plain, monkeypatch, tiny_shape, capsys):
    monkeypatch.setitem(generate.SHAPES, "uneven", {**generate.SHAPES["tiny"], "ffn_dim": 25})
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("RANK", "0")
    assert words in refusal(generate.main, ["--ckpt", str(plain), "--device", "cpu", *flags], capsys, tmp_path)


# ------------------------------------------------------------------------------------------------ bad input

BAD_TRAIN = {
    "no such file": ["--data", "missing.txt"],
    "a folder as data": ["--data", "."],
    "not text": ["--data", "binary"],
    "too short": ["--data", "short"],
    "too short for validation": ["--data", "shortish"],
    "unknown flag": ["--frobnicate", "1"],
    "unknown value": ["--preset", "gigantic"],
    "no number": ["--layers", "many"],
    "a fraction": ["--layers", "1.5"],
    "negative": ["--retrofit-steps", "-4"],
    "zero": ["--batch", "0"],
    "no number at all": ["--lr", "nan"],
    "head size does not divide": ["--dim", "10", "--heads", "4", "--kv-heads", "4"],
    "G does not divide H": ["--heads", "4", "--kv-heads", "3"],
    "CR below 1": ["--cr", "0.5"],
    "keep out of range": ["--cr", "3", "--keep", "5"],
    "keep below 1": ["--keep", "0.5"],
    "keep that is no list": ["--keep", "2,many"],
    "solidify what is not kept": ["--keep", "2,4", "--solidify", "3"],
    "passes that do not divide the batch": ["--batch", "8", "--micro-batch", "3"],
    "nothing to resume": ["--resume"],
    "no output folder": ["--out", "short/run"],
}

BAD_GENERATE = {
    "no such checkpoint": ["--ckpt", "missing"],
    "an empty folder": ["--ckpt", "."],
    "truncated": ["--ckpt", "truncated"],
    "no head": ["--show-merges", "9.9"],
    "no head number": ["--show-merges", "a"],
    "prompt too long": ["--prompt", "x" * 17],
    "too many tokens": ["--prompt", "x", "--tokens", "16"],
    "empty prompt": ["--prompt", ""],
    "negative temperature": ["--temperature", "-1"],
    "top-p above 1": ["--top-p", "2"],
    "no prompt file": ["--prompt-file", "missing"],
    "not a number": ["--tokens", "few"],
    "unknown cache": ["--cache", "tiny"],
    "prompts without out": ["--prompts", "short"],
    "no prompts": ["--prompts", "missing", "--out", "results"],
    "results to a folder": ["--prompts", "short", "--out", "truncated"],
    "results below a file": ["--prompts", "short", "--out", "short/results"],
    "results over the prompts": ["--prompts", "short", "--out", "short"],
    "results over something else": ["--prompts", "short", "--out", "binary"],
    "no profile": ["--prompts", "short", "--out", "results", "--profile", "short/profile"],
    "no GPU": ["--device", "cuda"],
    "a benchmark too short": ["--bench", "--tokens", "4"],
    "a benchmark too long": ["--bench", "--prompt-tokens", "9000"],
    "a benchmark to a folder": ["--bench", "--out", "truncated"],
    "a benchmark that does not fit": ["--bench", "--prompt-tokens", "8", "--tokens", "16", "--cache-gb", "1e-6"],
    "an unknown shape": ["--bench", "--model", "gpt5"],
    "a pool too small for one page": ["--prompts", "short", "--out", "results", "--cache-gb", "1e-9"],
}


@pytest.fixture
def messy_folder(tmp_path, monkeypatch, finished):
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "short").write_text("short")
    (tmp_path / "shortish").write_text("x" * 200)
    (tmp_path / "results").touch()
    (tmp_path / "truncated").mkdir()
    weights = (finished / "cr2/model.safetensors").read_bytes()
    (tmp_path / "truncated/model.safetensors").write_bytes(weights[:len(weights) // 2])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(main, arguments, capsys, folder):
    before = snapshot(folder)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert snapshot(folder) == before and "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    return captured.err


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_train_refuses(case, messy_folder, capsys, text):
    given_data = [] if "--data" in BAD_TRAIN[case] else ["--data", text]
    context = ["--context", "16"] if "--data" in BAD_TRAIN[case] else []
    assert refusal(train.main, [*given_data, *context, *BAD_TRAIN[case]], capsys, messy_folder).startswith("train.py: ")


def test_train_refuses_to_touch_another_run(finished, text, capsys):
    assert "already holds a run" in refusal(train.main, ["--out", str(finished), "--data", text, *TINY], capsys, finished)
    assert "--cr was 3" in refusal(train.main, ["--out", str(finished), "--resume", "--cr", "2"], capsys, finished)
    assert "without a control" in refusal(train.main, ["--out", str(finished), "--resume", "--solidify", "3"], capsys, finished)


def test_resume_refuses_other_text_and_damaged_state(tmp_path, text, capsys):
    out = tmp_path / "run"
    with pytest.raises(PowerCut):
        interrupted(out, text, dies)
    capsys.readouterr()
    for tensors in out.glob("state-*/*.distcp"):
        tensors.write_bytes(tensors.read_bytes()[:50])
    assert "damaged" in refusal(train.main, ["--out", str(out), "--resume"], capsys, out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "text": "another"}))
    assert "text" in refusal(train.main, ["--out", str(out), "--resume"], capsys, out)
    (out / "run.json").write_text("{")
    assert "damaged" in refusal(train.main, ["--out", str(out), "--resume"], capsys, out)


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_generate_refuses(case, messy_folder, capsys, finished):
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    checkpoint = [] if "--ckpt" in BAD_GENERATE[case] else ["--ckpt", str(finished)]
    assert refusal(generate.main, [*checkpoint, *BAD_GENERATE[case]], capsys, messy_folder).startswith("generate.py: ")


# ------------------------------------------------------------------------------------------------ the benchmark

@given(st.sampled_from([1.0, 1.5, 2.0, 4.0, 8.0]), seeds)
@settings(max_examples=10)
def test_forced_decisions_keep_what_they_should(cr, seed):
    """On average 1 / CR of the tokens, each head its own part, and the cache shows it."""
    config = config_of((8, 4), n_layer=6)
    kept = generate.kept_parts(config, cr, seed)
    assert kept.mean().item() == pytest.approx(1 / cr, rel=1e-4) and kept.max() <= 1
    assert cr == 1 or kept.std() > 0.2 * kept.mean()
    torch.manual_seed(seed)
    cache = generate.forced(kept, "cpu")(config, 50)
    q, k, v, alpha, omega = (x.float() for x in qkv(seed, (8, 4), 64, B=50))
    cache.attend(3, q, k, v, alpha, omega)
    expected = 1 + 63 * kept[3]                                  # the first token always appends
    assert ((cache.lengths[3].double().mean(0) - expected).abs() < 5 * (63 * kept[3] * (1 - kept[3]) / 50).sqrt() + 1e-3).all()


@torch.no_grad()
def test_the_compiled_peer_attends_as_a_cache():
    model = model_of(0, (8, 2), dmc=False)
    tokens = torch.randint(0, 29, (2, 12))
    reference = through_cache(model, tokens, 1)[0]
    cache, logits = generate.StaticCache(model.config, 2, None, torch.float64, 0, 20), []
    for t in range(12):
        logits.append(model(tokens[:, t:t + 1], cache, last=True)[0])
        cache.at.add_(1)
    assert_close(torch.cat(logits, dim=1), reference, 1e-5)      # its angles are fp32


@torch.no_grad()
def test_the_transformers_peer_has_the_same_weights_and_logits():
    oracle("transformers")
    model = generate.random_model("toy", dmc_fast, "cpu", torch.float32)
    bench = types.SimpleNamespace(model=model, config=model.config, device=torch.device("cpu"))
    tokens = torch.randint(0, 512, (2, 20))
    assert_close(generate.as_transformers(bench)(tokens).logits, model(tokens)[0], 1e-4)


def test_bench_command(tmp_path, capsys, finished):
    out = tmp_path / "folder.json"
    command = ["--bench", "--device", "cpu", "--tokens", "16", "--prompt-tokens", "40", "--cache-gb", "0.002", "--out"]
    assert generate.main([*command, str(out), "--cr", "3"]) == 0
    shown, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "Decisions are forced" in shown and "published, not measured" in shown and "toy" in written["model"]
    first, *rest = [row for row in written["rows"] if row["kind"] != "peer"]
    largest = next(row for row in rest if row["name"] == "CR 3, largest batch")
    assert first["ratio"] == 1 and first["cr"] == pytest.approx(1) and largest["cr"] == pytest.approx(3, rel=0.1)
    assert largest["batch"] > 1.5 * first["batch"]
    for row in written["rows"]:
        if row["kind"] != "peer":
            assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms_per_step"])
            assert row["kv_bytes_logical"] < row["kv_bytes_allocated"] <= row["pool_bytes"] <= 0.002e9
            assert 0 < row["attention_share"] < 1 and 0 < row["share_of_memory_bound_limit"] < 1 and row["preempted"] == 0
    slots = first["batch"] * 2 * 4 * (40 + 11)                   # layers, heads, tokens at the middle of the last half
    assert first["kv_bytes_logical"] == slots * 2 * 32 * 4
    assert generate.main([*command, str(out), "--ckpt", str(finished / "cr2"), "--batch", "1", "2"]) == 2
    assert "16 positions" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ real checkpoints

def oracle(name):
    """An independent implementation to compare with; requirements-dev.txt has them."""
    return pytest.importorskip(name, reason=f"{name} is not installed; pip install -r requirements-dev.txt")


@pytest.fixture(scope="session")
def smollm2():
    folder = os.environ.get("DMC_SMOLLM2")
    if not folder:
        pytest.skip("DMC_SMOLLM2 names no folder with SmolLM2-135M; .ci/run makes one where its tool is at hand")
    return Path(folder)


@pytest.fixture(scope="session")
def measured():
    """Figures that tests leave; DMC_RESULTS names a JSON file for them."""
    figures = {}
    yield figures
    if out := os.environ.get("DMC_RESULTS"):
        named = [f"{name}=..." for name in ("DMC_SMOLLM2", "DMC_MEGATRON") if name in os.environ]
        command = " ".join([*named, f"DMC_RESULTS=results/{Path(out).name} python -m pytest", shlex.join(sys.argv[1:])])
        dmc.write_json(out, {**figures, **generate.provenance(), "command": command})


@pytest.fixture(scope="session")
def english():
    path = Path(os.environ.get("DMC_CORPUS") or HERE.parent / "shared/data/corpus-val.txt.xz")
    if not path.is_file():
        pytest.skip(f"no English text at {path}; DMC_CORPUS may name another .txt.xz file")
    return lzma.decompress(path.read_bytes()).decode()


ROPES = st.one_of(
    st.none(), st.builds(lambda f: {"rope_type": "linear", "factor": f}, st.sampled_from([2.0, 4.0])),
    st.builds(lambda f, low, context: {"rope_type": "llama3", "factor": f, "low_freq_factor": low, "high_freq_factor": 4.0,
                                       "original_max_position_embeddings": context},
              st.sampled_from([2.0, 8.0]), st.sampled_from([0.5, 1.0]), st.sampled_from([16, 64])))
PLAIN = st.builds(lambda heads, layers, head_dim, tied, theta, rope: config_of(
    heads, n_layer=layers, head_dim=head_dim, tie_embeddings=tied, rope_theta=theta, rope_scaling=rope, dmc=False, window=12),
    groups, st.integers(1, 3), st.sampled_from([4, 8, 10]), st.booleans(), st.sampled_from([100.0, 10000.0, 500000.0]), ROPES)


def hugging_face_model(config, seed, dtype=torch.float32):
    """The same shape in transformers, with weights large enough that the attention is far from even."""
    transformers = oracle("transformers")
    torch.manual_seed(seed)
    rope = {**(config.rope_scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.ffn_dim, head_dim=config.head_dim,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope, initializer_range=0.3))
    return model.to(dtype).eval()


def largest_error(ours, theirs):
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


@given(PLAIN, seeds)
@settings(max_examples=20)
def test_logits_equal_transformers(tmp_path_factory, config, seed):
    folder = tmp_path_factory.mktemp("hf")
    theirs = hugging_face_model(config, seed)
    theirs.save_pretrained(folder)
    ours = dmc.load(folder, c=config.c)
    assert ours.config == config
    tokens = torch.randint(0, config.vocab_size, (2, config.max_seq_len))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert largest_error(ours(tokens)[0], expected) < 1e-4
        cache = ours.Cache(config, 2)
        cached = torch.cat([ours(part, cache)[0] for part in tokens.split([20, 1, 30, 13], dim=1)], dim=1)
        assert largest_error(cached, expected) < 1e-4
        assert largest_error(ours(tokens, last=True)[0], expected[:, -1:]) < 1e-4


def test_half_precision_is_as_good_as_transformers(tmp_path):
    ours, theirs = [], []
    for seed in range(8):
        model = hugging_face_model(config_of((8, 2), dmc=False), seed)
        tokens = torch.randint(0, 29, (2, 64))
        exact = model.double()(tokens).logits
        model.to(torch.bfloat16).save_pretrained(tmp_path / str(seed))
        with torch.no_grad():
            theirs.append((model(tokens).logits - exact).norm().item())
            ours.append((dmc.load(tmp_path / str(seed))(tokens)[0] - exact).norm().item())
    assert sum(ours) < 1.2 * sum(theirs)


def in_other_forms(folder, model):
    """Folders with the same weights: in shards, pickled, pickled in shards, with an old-style configuration."""
    model.save_pretrained(folder / "shards", max_shard_size="10KB")
    assert (folder / "shards/model.safetensors.index.json").is_file()
    facts, weights = json.loads((folder / "shards/config.json").read_text()), model.state_dict()
    names = list(weights)
    for name in ("pickled", "pickled-shards", "old"):
        (folder / name).mkdir()
    torch.save(weights, folder / "pickled/pytorch_model.bin")
    where = {name: f"pytorch_model-{1 + (i > 5)}.bin" for i, name in enumerate(names)}
    for file in set(where.values()):
        part = {name: w for name, w in weights.items() if where[name] == file}
        torch.save(part, folder / "pickled-shards" / file)
    (folder / "pickled-shards/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    rope = facts.pop("rope_parameters")
    old = {**facts, "rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    del old["head_dim"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)      # which old checkpoints carry
    torch.save(weights, folder / "old/pytorch_model.bin")
    for name, config in (("pickled", facts | {"rope_parameters": {**old["rope_scaling"], "rope_theta": old["rope_theta"]}}),
                         ("pickled-shards", old), ("old", old)):
        (folder / name / "config.json").write_text(json.dumps(config))
    return [folder / name for name in ("shards", "pickled", "pickled-shards", "old")]


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0}])
def test_every_layout_of_a_checkpoint_is_read(tmp_path, rope):
    model = hugging_face_model(config_of((4, 2), head_dim=None, rope_scaling=rope, rope_theta=300.0), 0)
    tokens = torch.randint(0, 29, (1, 30))
    expected = model(tokens).logits
    for folder in in_other_forms(tmp_path, model):
        assert largest_error(dmc.load(folder)(tokens)[0], expected) < 1e-4, folder


def test_transformers_reads_a_plain_model_and_refuses_a_dmc_model(tmp_path):
    transformers = oracle("transformers")
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}
    for tied in (False, True):
        plain = Transformer(config_of((8, 2), dmc=False, tie_embeddings=tied, rope_scaling=rope, rope_theta=700.0))
        dmc.save(plain, tmp_path / "plain", dmc.Tokenizer.bytes(), shard_bytes=20_000)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
        tokens = torch.randint(0, 29, (2, 40))
        assert largest_error(plain(tokens)[0], theirs(tokens).logits) < 1e-4
        assert theirs.config.eos_token_id == 256
    dmc.save(Transformer(config_of((8, 2))), tmp_path / "dmc")
    with pytest.raises((ValueError, KeyError), match="dmc_llama"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dmc")


@given(PLAIN, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
       st.sampled_from([600, 3000, 5 * 10 ** 9]), seeds)
def test_saving_and_loading_is_bit_exact(tmp_path_factory, config, decides, dtype, shard_bytes, seed):
    torch.manual_seed(seed)
    model = Transformer(train.replace(config, dmc=decides)).to(dtype)
    folder = tmp_path_factory.mktemp("exact")
    dmc.save(model, folder, dmc.Tokenizer.bytes(), shard_bytes=shard_bytes)
    again = dmc.load(folder, c=config.c)
    assert again.config == model.config
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == dtype for name in theirs)
    assert (again.lm_head.weight is again.embed_tokens.weight) == config.tie_embeddings
    sizes = [f.stat().st_size for f in folder.glob("*.safetensors")]
    largest = max(p.nbytes for p in model.parameters())
    assert (len(sizes) > 1) == (sum(p.nbytes for p in model.parameters()) > shard_bytes)
    assert all(size < max(shard_bytes, largest) + 4000 for size in sizes)        # and a header
    assert dmc.load(folder, dtype=torch.float64).lm_head.weight.dtype == torch.float64


def checkpoint_is(folder, model):
    loaded = dmc.load(folder)
    return loaded.config == model.config and all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*differs from what was saved")
@pytest.mark.parametrize("before, after", [(0, 0), (0, 2000), (2000, 0), (2000, 2000), (2000, 1500)])
def test_a_kill_at_any_moment_of_saving_leaves_one_whole_checkpoint(tmp_path, before, after):
    """0: one file; otherwise bytes per shard. The process dies at each of its changes to the folder in turn."""
    torch.manual_seed(0)
    old, new = Transformer(config_of()), Transformer(config_of(n_layer=3))
    moments, seen = 0, set()
    while True:
        folder = tmp_path / str(moments)
        dmc.save(old, folder, shard_bytes=before or 10 ** 9)
        with pytest.MonkeyPatch.context() as patch:
            left = iter(range(moments))

            def dying(change, left=left):
                def wrapped(*args, **kwargs):
                    if next(left, None) is None:
                        raise KeyboardInterrupt
                    return change(*args, **kwargs)
                return wrapped

            patch.setattr(Path, "replace", dying(Path.replace))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            try:
                dmc.save(new, folder, shard_bytes=after or 10 ** 9)
                finished = True
            except KeyboardInterrupt:
                finished = False
        states = [checkpoint_is(folder, model) for model in (old, new)]
        assert sum(states) == 1
        seen.add(states.index(True))
        if finished:
            break
        moments += 1
    assert seen == {0, 1} and states[1] and moments >= 2
    dmc.save(new, folder, shard_bytes=after or 10 ** 9)
    files = {f.name for f in folder.iterdir()}
    assert len([f for f in files if f.endswith(".safetensors")]) == len(dmc.weight_files(folder))
    assert ("model.safetensors" in files) == (after == 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small plain checkpoint over bytes, as somebody might hand it over."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    torch.manual_seed(1)
    dmc.save(Transformer(config_of((4, 2), vocab_size=257, dmc=False)), folder, dmc.Tokenizer.bytes())
    return folder


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite(folder, change, **facts):
    """The checkpoint's weights written anew, by safetensors itself, after change(weights); with facts in config.json."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda c: c.update(facts))


def with_header(folder, change, length=None):
    """The header of model.safetensors after change(header), or with another length before it."""
    data = (folder / "model.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    change(header)
    text = json.dumps(header).encode()
    prefix = (len(text) if length is None else length).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(prefix + text + data[8 + n:])


def configured(**facts):
    return lambda folder: rewrite(folder, lambda w: None, **facts)


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
NOTHING = lambda header: None
def peak_memory():
    """Bytes of memory that this process had at most, pages of mapped files included; Linux only."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("there is no /proc/self/status to read the peak memory from")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])


BAD_CHECKPOINTS = {
    "header length": (lambda f: with_header(f, NOTHING, 2 ** 62), "truncated, damaged"),
    "header length just too large": (lambda f: with_header(f, NOTHING, 99_000_000), "truncated, damaged"),
    "header length zero": (lambda f: with_header(f, NOTHING, 0), "truncated, damaged"),
    "offsets beyond the file": (lambda f: with_header(f, lambda h: h[NORM].update(data_offsets=[0, 2 ** 50])), "damaged"),
    "offsets reversed": (lambda f: with_header(f, lambda h: h[NORM]["data_offsets"].reverse()), "damaged"),
    "overlapping ranges": (lambda f: with_header(f, lambda h: h[NORM].update(data_offsets=[0, 64])), "damaged"),
    "negative offset": (lambda f: with_header(f, lambda h: h[NORM].update(data_offsets=[-64, 0])), "damaged"),
    "unknown dtype": (lambda f: with_header(f, lambda h: h[NORM].update(dtype="F7")), "damaged"),
    "another dtype": (lambda f: with_header(f, lambda h: h[NORM].update(dtype="F16")), "damaged"),
    "a shape of another size": (lambda f: with_header(f, lambda h: h[NORM].update(shape=[2 ** 40])), "damaged"),
    "integers": (lambda f: rewrite(f, lambda w: w.update({NORM: w[NORM].int()})), "quantized.*norm.weight"),
    "eight-bit floats": (lambda f: rewrite(f, lambda w: w.update({NORM: w[NORM].to(torch.float8_e4m3fn)})), "quantized"),
    "a tensor missing": (lambda f: rewrite(f, lambda w: w.pop(NORM)), "missing: norm.weight"),
    "a tensor too many": (lambda f: rewrite(f, lambda w: w.update(extra=torch.ones(1))), "unexpected: extra"),
    "a bias": (lambda f: rewrite(f, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(1)})), "q_proj.b"),
    "a tensor misshapen": (lambda f: rewrite(f, lambda w: w.update({NORM: torch.ones(3)})), r"norm.weight \(3,\), not \(16"),
    "rows too few": (lambda f: rewrite(f, NOTHING, vocab_size=300), "embed_tokens.weight"),
    "layers beyond count": (configured(num_hidden_layers=10 ** 12), "too few for"),
    "an output matrix although tied": (configured(tie_word_embeddings=True), "ties the output matrix"),
    "sizes enormous": (configured(hidden_size=2 ** 50, head_dim=2 ** 20), "sizes beyond"),
    "a size negative": (configured(hidden_size=-16), "dim is -16"),
    "a size no number": (configured(hidden_size="sixteen"), "dim is 'sixteen'"),
    "a size missing": (lambda f: (rewrite(f, NOTHING), edit_json(f / "config.json", lambda c: c.pop("hidden_size"))), "dim"),
    "another architecture": (configured(model_type="gpt2"), "type gpt2"),
    "no architecture": (configured(model_type=None), "type None"),
    "attention bias": (configured(attention_bias=True), "attention bias"),
    "MLP bias": (configured(mlp_bias=True), "bias in its MLP"),
    "sliding window": (configured(sliding_window=4096), "sliding-window"),
    "quantized": (configured(quantization_config={"quant_method": "gptq"}), "quantized"),
    "another activation": (configured(hidden_act="gelu"), "gelu"),
    "another rotary embedding": (configured(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
    "rotary embedding by halves": (configured(rope_scaling={"rope_type": "llama3", "factor": 4.0}), "low_freq_factor"),
    "part of the channels rotated": (configured(partial_rotary_factor=0.5), "partial"),
    "another method": (configured(model_type="dmc_llama", dmc={"method": "h2o"}), "h2o"),
    "rope_theta no number": (configured(rope_theta="large"), "rope_theta"),
    "configuration a list": (lambda f: (rewrite(f, NOTHING), (f / "config.json").write_text("[]")), "no usable configuration"),
    "configuration cut off": (lambda f: (rewrite(f, NOTHING), (f / "config.json").write_text('{"hid')), "damaged"),
    "configuration missing": (lambda f: (rewrite(f, NOTHING), (f / "config.json").unlink()), "config.json is missing"),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "an empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "weights a pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), "git lfs pull"),
    "configuration a pointer": (lambda f: (f / "config.json").write_text(POINTER), "git lfs pull"),
    "a shard missing": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors"}}')), "lacks model-1.safetensors"),
    "an index without map": (lambda f: ((f / "model.safetensors").unlink(),
                                        (f / "model.safetensors.index.json").write_text("{}")), "no index"),
    "an index that leaves the folder": (lambda f: ((f / "model.safetensors").unlink(), (
        f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')), "lacks secret"),
    "pickled code": (lambda f: ((f / "model.safetensors").unlink(), torch.save(
        {"a": Transformer}, f / "pytorch_model.bin")), "more than weights"),
    "pickled numbers": (lambda f: ((f / "model.safetensors").unlink(), torch.save({"a": 1}, f / "pytorch_model.bin")),
                        "not all of it is tensors"),
    "no pickle": (lambda f: ((f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_bytes(b"x" * 99)), "damaged"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_unusable_checkpoints_are_refused_in_a_sentence(tmp_path, plain, capsys, case):
    damage, says = BAD_CHECKPOINTS[case]
    folder = shutil.copytree(plain, tmp_path / "model")
    damage(folder)
    with pytest.raises(InputError, match=says):
        dmc.load(folder)
    said = refusal(generate.main, ["--ckpt", str(folder), "--prompt", "x"], capsys, tmp_path)
    assert said.startswith("generate.py: ") and said.rstrip().endswith((".", ")"))


@pytest.mark.filterwarnings("ignore")
@given(st.data())
@settings(max_examples=80)
def test_corrupted_checkpoints_neither_crash_nor_hang_nor_allocate_wildly(tmp_path_factory, plain, data):
    """Random damage to one file: refused in one line, or harmless."""
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("corrupted") / "model")
    file = folder / data.draw(st.sampled_from(["model.safetensors", "config.json", "tokenizer.json"]))
    content = bytearray(file.read_bytes())
    reach = len(content) if file.suffix == ".json" else 8 + int.from_bytes(content[:8], "little") + 40
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(reach, len(content)) - 1))
        kind = data.draw(st.sampled_from(["set", "digit", "cut", "insert", "remove"]))
        if kind == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "digit":                    # numbers are where the damage hides
            digits = [i for i in range(reach) if i < len(content) and chr(content[i]).isdecimal()] or [at]
            content[data.draw(st.sampled_from(digits))] = data.draw(st.sampled_from(b"0123456789-eE."))
        elif kind == "cut":
            del content[max(1, at):]
            break
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=6))
        else:
            del content[at:at + data.draw(st.integers(1, 9))]
    file.write_bytes(content)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")          # forget the peak so far
    before, began = peak_memory(), time.monotonic()
    for read in (dmc.load, dmc.Tokenizer.from_folder):
        try:
            read(folder)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
    assert time.monotonic() - began < 10
    assert peak_memory() - before < 3e8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_warned_of(tmp_path, plain, value, capsys):
    folder = shutil.copytree(plain, tmp_path / "model")
    rewrite(folder, lambda w: w["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    with pytest.warns(UserWarning, match=r"NaN or infinite, in layers.1.mlp.up_proj.weight;"):
        dmc.load(folder)
    with pytest.warns(UserWarning):
        assert "not numbers" in refusal(generate.main, ["--ckpt", str(folder), "--prompt", "x"], capsys, tmp_path)


LOADING = """
import sys, torch, dmc
from test_dmc import peak_memory as peak
torch.zeros(1) + 1
before = peak()
model = dmc.load(sys.argv[1])
size = sum(p.nbytes for p in model.parameters())
assert all(p.max().isfinite() for p in model.parameters())         # every weight is in memory now
print(size, peak() - before)
"""


def test_loading_takes_no_more_memory_than_the_weights_smollm2(tmp_path, smollm2, measured):
    """On 2 GB in bf16, in shards and in one file: below 1.15 times the weights."""
    config = Config(vocab_size=32000, n_layer=18, n_head=16, n_kv_head=16, dim=2048, ffn_dim=5504, max_seq_len=2048, dmc=False)
    torch.set_default_dtype(torch.bfloat16)
    model = Transformer(config)
    torch.set_default_dtype(torch.float32)
    for shard_bytes in (10 ** 9, 5 * 10 ** 9):
        dmc.save(model, tmp_path, shard_bytes=shard_bytes)
        command = [sys.executable, "-c", LOADING, tmp_path]
        size, peak = map(int, subprocess.run(command, cwd=HERE, capture_output=True, check=True).stdout.split())
        files = len(dmc.weight_files(tmp_path))
        measured[f"peak memory of loading {size / 1e9:.2f} GB in {files} files, in weights"] = peak / size
        assert size > 2e9 and peak < 1.15 * size
    shutil.rmtree(tmp_path)


# ------------------------------------------------------------------------------------------------ finding models

def in_hub_cache(hub, plain, repo="meta-llama/Llama-2-7b-hf"):
    folder = hub / ("models--" + repo.replace("/", "--"))
    shutil.copytree(plain, folder / "snapshots/abc")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    return folder / "snapshots/abc"


@pytest.mark.parametrize("variable, below", [("HF_HUB_CACHE", "."), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"),
                                             ("HOME", ".cache/huggingface/hub")])
def test_models_are_found_in_hugging_faces_cache(tmp_path, monkeypatch, plain, variable, below):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    expected = in_hub_cache(tmp_path / below, plain)
    assert generate.locate("llama2-7b") == generate.locate("meta-llama/Llama-2-7b-hf") == expected
    assert generate.locate(str(plain)) == plain


def test_models_that_are_not_there(tmp_path, monkeypatch, capsys, plain):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)          # as if it were not installed
    monkeypatch.chdir(tmp_path)
    for main, flag in ((generate.main, "--ckpt"), (train.main, "--init")):
        said = refusal(main, [flag, "llama2-13b"], capsys, tmp_path)
        assert "pip install huggingface_hub && hf download meta-llama/Llama-2-13b-hf --include '*.json' '*.safetensors'" in said
        assert "no folder, and no model's name" in refusal(main, [flag, "missing"], capsys, tmp_path)
    snapshot_of = in_hub_cache(tmp_path / "hub", plain, "a/b")
    (snapshot_of / "model.safetensors").unlink()                        # half fetched
    assert "hf download a/b" in refusal(generate.main, ["--ckpt", "a/b"], capsys, tmp_path)
    fetched = []
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(
        snapshot_download=lambda repo, allow_patterns: fetched.append(repo) or str(plain)))
    assert generate.locate("a/b") == plain and fetched == ["a/b"]

    def fails(repo, allow_patterns):
        raise ConnectionError("no route\nto host")
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=fails))
    assert "ConnectionError: no route" in refusal(generate.main, ["--ckpt", "a/b"], capsys, tmp_path)


def test_known_shapes():
    """The parameters that the models are named for."""
    for name, billions in (("llama2-7b", 6.74), ("llama2-13b", 13.02), ("llama2-70b", 68.98)):
        with torch.device("meta"):
            model = Transformer(Config(**generate.SHAPES[name], dmc=False))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.fixture
def tiny_shape(monkeypatch):
    monkeypatch.setitem(generate.SHAPES, "tiny", dict(vocab_size=300, n_layer=1, n_head=4, n_kv_head=2, dim=16, ffn_dim=24,
                                                      max_seq_len=64))


def test_random_weights(tmp_path, monkeypatch, tiny_shape, text, capsys):
    monkeypatch.chdir(tmp_path)
    model = generate.random_model("tiny")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()) and torch.get_default_dtype() == torch.float32
    assert generate.main(["--ckpt", "tiny", "--random-weights", "--prompt", "x", "--tokens", "5"]) == 0
    assert train.main(["--init", "tiny", "--random-weights", "--data", text, *RETROFIT, "--out", "run"]) == 0
    assert dmc.load("run/cr3").config.vocab_size == 300
    capsys.readouterr()
    assert "no shape" in refusal(generate.main, ["--ckpt", "huge", "--random-weights"], capsys, tmp_path)
    assert "--random-weights needs" in refusal(train.main, ["--random-weights", "--data", text], capsys, tmp_path)


# ------------------------------------------------------------------------------------------------ a given model

RETROFIT = ["--context", "16", "--batch", "2", "--free-steps", "3", "--retrofit-steps", "5", "--solidify-steps", "3",
            "--cr", "3", "--keep", "2", "3", "--eval-sequences", "4", "--save-every", "4", "--log-every", "3", "--warmup", "2",
            "--c", "0"]


def own_loss(model, s, tokens):
    x, y = train.batch(tokens, s, 0, "cpu")
    return F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item()


def test_a_given_model_is_retrofitted(tmp_path, plain, text, capsys, monkeypatch):
    out, before = tmp_path / "run", snapshot(plain)
    monkeypatch.chdir(plain.parent)
    assert train.main(["--init", plain.name, "--data", text, *RETROFIT, "--out", str(out)]) == 0
    monkeypatch.chdir(tmp_path)                                     # and what follows works from anywhere
    shown = capsys.readouterr().out
    assert "nats/token" in shown and "to pretrained" in shown and "control" not in shown and snapshot(plain) == before
    steps = curve(out)
    assert [s["phase"] for s in steps] == ["free"] * 3 + ["retrofit"] * 5 + ["solidify"] * 6
    s = train.Settings(**json.loads((out / "run.json").read_text())["settings"])
    given = dmc.load(plain)
    assert steps[0]["loss"] == pytest.approx(own_loss(given, s, train.load_data(s, plain)[0]))
    assert not (out / "pretrained/model.safetensors").exists()           # measured, not copied
    made = dmc.load(out / "cr3")
    assert made.config == train.replace(given.config, **s.method(dmc=True))
    assert (out / "cr3/tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()
    section = json.loads((out / "cr3/config.json").read_text())["dmc"]
    assert section["phase"] == "solidify" and section["target_cr"] == 3 and section["cr"] > 1
    assert generate.main(["--ckpt", str(out), "--prompt", "3 times", "--tokens", "4"]) == 0
    assert train.main(["--resume", "--out", str(out)]) == 0


def test_a_given_model_with_a_control_and_a_kill(tmp_path, plain, text, monkeypatch):
    curves = []
    for name, dies_at in (("whole", None), ("killed", 9)):
        arguments = ["--out", str(tmp_path / name)]
        with pytest.MonkeyPatch.context() as patch:
            calls, step = iter(range(100)), train.train_step

            def dying_step(*args, dies_at=dies_at, calls=calls, step=step):
                if next(calls) == dies_at:
                    raise RuntimeError("power cut")
                return step(*args)

            patch.setattr(train, "train_step", dying_step)
            with contextlib.suppress(RuntimeError):
                train.main([*arguments, "--init", str(plain), "--control", "--data", text, *RETROFIT])
        assert train.main([*arguments, "--resume"]) == 0
        curves.append(curve(tmp_path / name))
    assert curves[0] == curves[1] and "control" in summary(tmp_path / "whole")


def test_solidify_starts_from_any_kept_model_also_later(tmp_path, plain, text, capsys):
    for name, chosen in (("at once", "3,2"), ("later", "3")):
        arguments = ["--init", str(plain), "--data", text, *RETROFIT, "--solidify", chosen]
        assert train.main([*arguments, "--out", str(tmp_path / name)]) == 0
    later = tmp_path / "later"
    assert (later / "retrofit-2").exists() and not (later / "cr2").exists()
    assert [entry["target"] for entry in summary(later)["dmc"]] == [3]
    capsys.readouterr()
    resume = ["--resume", "--out", str(later), "--solidify"]
    assert "behind those" in refusal(train.main, [*resume, "2,3"], capsys, tmp_path)
    assert train.main([*resume, "3,2"]) == 0
    assert curve(later) == curve(tmp_path / "at once") and summary(later)["dmc"] == summary(tmp_path / "at once")["dmc"]


BAD_INIT = {
    "a size of the small model": (["--layers", "2"], "--layers is for the small model"),
    "steps of pretraining": (["--pretrain-steps", "5"], "--pretrain-steps is for the small model"),
    "more context than positions": (["--context", "65"], "more than the model's 64 positions"),
    "compressed already": (["--init", "cr3"], "is a DMC model already"),
    "no tokenizer": (["--init", "mute"], "holds no tokenizer.json"),
    "another tokenizer": (["--init", "mixed"], "belongs to another model"),
    "a tokenizer of too many": (["--init", "many"], "belongs to another model"),
    "a pointer for a tokenizer": (["--init", "pointer"], "git lfs pull"),
}


@pytest.mark.parametrize("case", BAD_INIT)
def test_train_refuses_a_given_model(tmp_path, monkeypatch, plain, finished, text, capsys, case):
    arguments, says = BAD_INIT[case]
    for name in ("plain", "mute", "mixed", "many", "pointer"):
        shutil.copytree(plain, tmp_path / name)
    shutil.copytree(finished / "cr3", tmp_path / "cr3")
    (tmp_path / "mute/tokenizer.json").unlink()
    edit_json(tmp_path / "mixed/config.json", lambda c: c.update(vocab_size=32000))
    edit_json(tmp_path / "many/config.json", lambda c: c.update(vocab_size=256))
    (tmp_path / "pointer/tokenizer.json").write_text(POINTER)
    monkeypatch.chdir(tmp_path)
    given = [] if "--init" in arguments else ["--init", "plain"]
    assert says in refusal(train.main, [*given, "--data", text, "--context", "16", *arguments], capsys, tmp_path)


# ------------------------------------------------------------------------------------------------ tokenizers

SAMPLE = "".join(Path(f).read_text(encoding="utf-8", errors="ignore")[:4000] for f in train.standard_library()[:60]) + """
Größe, naïve café, Привет мир, Ελληνικά, 中文分词测试, 日本語のテキスト, 한국어, العربية, עברית, हिन्दी, ไทย,
emoji 🙂👍🏽👨‍👩‍👧, 1234567890, ½ ² Ⅷ,
\tTabs, "quotes" and 'apostrophes': it's, we'll, I'd, THEY'RE, don’t … — – ▁ underscores ▁▁ ∑ ∫ √
"""
SPECIAL = ["<s>", "</s>", "<|start|>"]
AWKWARD = st.sampled_from([
    "▁", " ", "  ", " " * 17, "\n", "\r\n", "\t", "\x00", "\x04", "\x1d", "\x7f", "\x85", "\xa0", "\xad", "\u3000", "\ufeff",
    "\ufffd", "'s", "'S", "'\u017f", "12345", "½", "Ⅷ", "é", "e\u0301", "🙂", "👨\u200d👩", "中文", "\U000c0000", "\U0010ffff",
    "<s>", " </s>", "<|start|>", "<s", "the", "def ", "==", "=====", "aaaaaaaa"])
TEXTS = st.one_of(st.text(), st.lists(st.one_of(AWKWARD, st.text(max_size=3)), max_size=12).map("".join))


def byte_level(pre_tokenizer, alphabet=True, template=False, **model):
    """A tokenizer.json of byte-level BPE, trained here. alphabet False: bytes that the sample lacks stay unknown."""
    tokenizers = oracle("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(**model))
    made.pre_tokenizer = pre_tokenizer(tokenizers.pre_tokenizers, tokenizers.Regex)
    made.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    made.train_from_iterator(SAMPLE.splitlines(keepends=True), tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False))
    if template:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made.to_str()


def sentencepiece_model(directory):
    """A SentencePiece BPE vocabulary with byte fallback, trained here: its processor."""
    sentencepiece = oracle("sentencepiece")
    (directory / "sample.txt").write_text(SAMPLE)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "sample.txt"), model_prefix=str(directory / "sp"), model_type="bpe", vocab_size=1200,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.995, minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "sp.model"))


def sentencepiece_json(processor, normalized=False, **form):
    """That vocabulary as tokenizer.json, in the form that Llama 2's has, or another one."""
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    score = {piece: processor.get_score(i) for i, piece in enumerate(pieces)}
    merges = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))
              if piece[:i] in vocab and piece[i:] in vocab
              and not processor.is_control(vocab[piece]) and not processor.is_byte(vocab[piece])]
    merges.sort(key=lambda pair: (-score[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]))
    special = [{"id": i, "content": name, "special": True, "normalized": normalized, "single_word": False, "lstrip": False,
                "rstrip": False} for name, i in (("<unk>", 0), ("<s>", 1), ("</s>", 2))]
    special.append({**special[0], "id": len(pieces), "content": "<|start|>", "special": False})
    llama2 = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {
        "type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}, "pre_tokenizer": None, "decoder": {
            "type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {
                "type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, **llama2, **form,
                       "post_processor": {"type": "TemplateProcessing", "single": [
                           {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
                       "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
                                 "dropout": None, "merges": [" ".join(pair) for pair in merges]}})


def metaspace(scheme, split):
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    return {"normalizer": None, "pre_tokenizer": step}


LLAMA3 = dmc.SPLITS["Llama 3"]
MAKES = {
    "GPT-2": lambda sp: byte_level(lambda pre, _: pre.ByteLevel(add_prefix_space=False)),
    "GPT-2, bytes missing": lambda sp: byte_level(lambda pre, _: pre.ByteLevel(add_prefix_space=False), alphabet=False),
    "SmolLM2": lambda sp: byte_level(lambda pre, _: pre.Sequence([
        pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]), alphabet=False),
    "Llama 3": lambda sp: byte_level(lambda pre, regex: pre.Sequence([
        pre.Split(regex(LLAMA3), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]), template=True),
    "Llama 3, whole words first": lambda sp: byte_level(lambda pre, regex: pre.Sequence([
        pre.Split(regex(LLAMA3), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]), ignore_merges=True),
    "Llama 2": lambda sp: sentencepiece_json(sp),
    "Llama 2, names normalized": lambda sp: sentencepiece_json(sp, normalized=True),
    "Mistral": lambda sp: sentencepiece_json(sp, **metaspace("first", False)),
    "a blank before every section": lambda sp: sentencepiece_json(sp, **metaspace("always", False)),
    "word by word": lambda sp: sentencepiece_json(sp, **metaspace("never", True)),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name -> (ours, the oracle), made when first asked for."""
    made, processor = {}, []

    def of(name):
        tokenizers = oracle("tokenizers")
        if name not in made:
            if not processor:
                processor.append(sentencepiece_model(tmp_path_factory.mktemp("sp")))
            facts = MAKES[name](processor[0])
            made[name] = dmc.Tokenizer({"tokenizer.json": facts.encode()}), tokenizers.Tokenizer.from_str(facts)
        return made[name]
    return of


def assert_same_tokens(ours, theirs, text):
    """The same ids in all four ways, the same text back, and a stream that never shows half a character."""
    for special in (True, False):
        theirs.encode_special_tokens = not special
        for prefix in (True, False):
            ids = theirs.encode(text, add_special_tokens=prefix).ids
            assert ours.encode(text, special=special, prefix=prefix) == ids
        if theirs.decode(ids, skip_special_tokens=False) == text:
            assert ours.decode(ids, special=True) == text
            assert ours.special & set(ids) or ours.decode(ids) == text
    if ours.decode(ids, special=True) == text and "\ufffd" not in text:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            assert "\ufffd" not in "".join(decoder.decode(ours.token_bytes([i], special=True)) for i in ids)


@pytest.mark.parametrize("name", MAKES)
@given(text=TEXTS)
@settings(max_examples=150)
def test_tokens_equal_the_tokenizers_library(trained, name, text):
    assert_same_tokens(*trained(name), text)


@pytest.mark.parametrize("name", MAKES)
def test_tokens_of_sources_equal_the_tokenizers_library(trained, name):
    """Longer texts: Python sources, long runs of blanks and of one character, and every character of the first planes."""
    ours, theirs = trained(name)
    texts = [Path(f).read_text(encoding="utf-8", errors="ignore") for f in train.standard_library()[::160]]
    planes = [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    texts += ["".join(planes[i:i + 4096]) for i in range(0, len(planes), 4096)]
    texts += ["a".join([" " * n, "\n" * n, "▁" * n, "=" * n, "a" * n]) for n in (1, 2, 3, 15, 16, 17, 100, 5000)]
    for text in texts:
        assert_same_tokens(ours, theirs, text)


def test_tokens_equal_sentencepiece(trained, tmp_path):
    ours, _ = trained("Llama 2")
    processor = sentencepiece_model(tmp_path)
    for text in (SAMPLE, " two  blanks ", "▁", "x" * 300, "\n\n", *SAMPLE.splitlines()):
        assert ours.encode(text, special=False) == processor.encode(text)


def test_the_byte_tokenizer_is_one_for_the_tokenizers_library(tmp_path):
    ours = dmc.Tokenizer.bytes()
    theirs = oracle("tokenizers").Tokenizer.from_str(ours.files["tokenizer.json"].decode())
    for text in (SAMPLE, "a<|endoftext|>b"):
        assert_same_tokens(ours, theirs, text)
    assert ours.encode("<|endoftext|>") == [256] and len(ours.encode("<|endoftext|>", special=False)) == 13


def changed(**facts):
    return lambda t: t.update(facts)


def changed_model(**facts):
    return lambda t: t["model"].update(facts)


def added(**facts):
    return lambda t: t["added_tokens"][0].update(facts)


BAD_TOKENIZERS = {
    "unknown pre-tokenizer": (changed(pre_tokenizer={"type": "BertPreTokenizer"}), "unknown pre-tokenizer, BertPreTokenizer"),
    "unknown pattern": (changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}), r"Split.*x\+"),
    "a blank in front": (changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "add_prefix_space"),
    "digits in groups": (changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": False}, {"type": "ByteLevel", "add_prefix_space": False}]}), "Digits"),
    "unknown normalizer": (changed(normalizer={"type": "NFKC"}), "NFKC"),
    "unknown post-processor": (changed(post_processor={"type": "BertProcessing"}), "BertProcessing"),
    "tokens behind a text": (changed(post_processor={"type": "TemplateProcessing", "special_tokens": {}, "single": [
        {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<s>"}}]}), "behind every text"),
    "another model": (changed_model(type="Unigram"), "type Unigram"),
    "dropout": (changed_model(dropout=0.1), "dropout"),
    "suffixes": (changed_model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "no byte fallback": (changed(pre_tokenizer=None), "byte fallback"),
    "a token that eats blanks": (added(lstrip=True), "lstrip"),
    "a token that is a word": (added(single_word=True), "single_word"),
    "no model": (lambda t: t.pop("model"), "damaged"),
    "no vocabulary": (lambda t: t["model"].pop("vocab"), "damaged"),
    "merges of one": (changed_model(merges=["a"]), "damaged"),
    "an id no number": (added(id="x"), "damaged"),
    "an id negative": (changed_model(vocab={"a": -1}), "damaged"),
    "bytes missing for the fallback": (lambda t: (t.update(pre_tokenizer=None), t["model"].update(byte_fallback=True)),
                                       "damaged"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_tokenizers_that_are_not_known_are_refused_by_name(tmp_path, case):
    change, says = BAD_TOKENIZERS[case]
    (tmp_path / "tokenizer.json").write_bytes(dmc.Tokenizer.bytes().files["tokenizer.json"])
    edit_json(tmp_path / "tokenizer.json", change)
    with pytest.raises(InputError, match=says) as refused:
        dmc.Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_ends_of_text_are_gathered(tmp_path, plain):
    folder = shutil.copytree(plain, tmp_path / "model")
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=[3, 256]))
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 7]}')
    tokenizer = dmc.Tokenizer.from_folder(folder)
    assert tokenizer.stops == [3, 256, 7] and tokenizer.eos == 3
    dmc.save(dmc.load(plain), tmp_path / "again", tokenizer)
    again = dmc.Tokenizer.from_folder(tmp_path / "again")
    assert again.stops == tokenizer.stops and again.files == tokenizer.files
    edit_json(folder / "config.json", lambda c: c.pop("eos_token_id"))
    (folder / "generation_config.json").unlink()
    assert dmc.Tokenizer.from_folder(folder).eos is None


def test_too_many_blanks_in_a_row_are_refused():
    with pytest.raises(InputError, match="blanks in a row"):
        dmc.Tokenizer.bytes().encode(" " * 3_000_000 + "x")


# ------------------------------------------------------------------------------------------------ SmolLM2

@pytest.fixture(scope="session")
def smollm2_pair(smollm2):
    """The model in fp32, ours and transformers'."""
    transformers = oracle("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return dmc.load(smollm2, dtype=torch.float32), theirs.eval()


@torch.no_grad()
def test_smollm2_logits_equal_transformers(smollm2, smollm2_pair, english, measured):
    ours, theirs = smollm2_pair
    tokens = torch.tensor([dmc.Tokenizer.from_folder(smollm2).encode(english[:8000])[:1024]])
    exact = theirs(tokens).logits
    measured["largest error of fp32 logits over 1,024 tokens, relative"] = largest_error(ours(tokens)[0], exact)
    assert tokens.size(1) == 1024 and largest_error(ours(tokens)[0], exact) < 1e-4
    half = type(theirs).from_pretrained(smollm2, dtype=torch.bfloat16)
    errors = [(logits.float() - exact).norm().item() for logits in (dmc.load(smollm2)(tokens)[0], half(tokens).logits)]
    measured["error of bf16 logits, in transformers' own"] = errors[0] / errors[1]
    assert errors[0] < 1.2 * errors[1]


@torch.no_grad()
def test_smollm2_greedy_generation_equals_transformers(smollm2, smollm2_pair, english):
    ours, theirs = smollm2_pair
    for prompt in (english[:600], "The capital of France is"):
        ids = dmc.Tokenizer.from_folder(smollm2).encode(prompt)
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0)
        cache = ours.Cache(ours.config, 1)
        greedy = generate.generate(ours, cache, ids, 200, lambda x, _: x.argmax().item())
        assert list(greedy) == expected[0, len(ids):].tolist()


@pytest.fixture(scope="session")
def smollm2_tokenizers(smollm2):
    theirs = oracle("tokenizers").Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    return dmc.Tokenizer.from_folder(smollm2), theirs


def test_smollm2_tokens_equal_the_tokenizers_library(smollm2_tokenizers, english, measured):
    ours, theirs = smollm2_tokenizers
    began = time.perf_counter()
    ours.encode(english)
    then = time.perf_counter()
    theirs.encode(english)
    measured["encoding 1.8 MB, ours / tokenizers' seconds"] = (then - began) / (time.perf_counter() - then)
    theirs.encode_special_tokens = False
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    planes = [everything[i:i + 65536] for i in range(0, len(everything), 65536)]
    sources = [Path(f).read_text(encoding="utf-8", errors="ignore") for f in train.standard_library()]
    for text in [english[:2_000_000], *planes, *(" ".join(plane[:3000]) for plane in planes), *sources]:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids
        if theirs.decode(ids) == text:
            assert ours.decode(ids) == text


@given(text=TEXTS)
@settings(max_examples=300)
def test_smollm2_tokens_of_awkward_texts(smollm2_tokenizers, text):
    for awkward in (text, text.replace("<s>", "<|im_start|>").replace("the", "\x04").replace("\n", "\U00050000")):
        assert_same_tokens(*smollm2_tokenizers, awkward)


class Clock:
    """Takes the time of every token that transformers generates."""

    def put(self, _):
        self.times.append(time.perf_counter())

    def end(self):
        pass


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2_is_no_slower_than_transformers(smollm2, english, measured, dtype):
    """Seconds of a prefill of 512 tokens, and of a token after it: the best of ten turns each, since noise only adds."""
    ours = dmc.load(smollm2, dmc_fast, dtype=dtype)
    theirs = oracle("transformers").LlamaForCausalLM.from_pretrained(smollm2, dtype=dtype).eval()
    ids, clock, seconds = dmc.Tokenizer.from_folder(smollm2).encode(english[:8000])[:512], Clock(), {"ours": [], "theirs": []}
    for _ in range(10):
        clock.times = [time.perf_counter()]
        for _ in generate.generate(ours, ours.Cache(ours.config, 1, None, dtype), ids, 20, lambda x, _: x.argmax().item()):
            clock.put(None)
        seconds["ours"].append(np.diff(clock.times))
        clock.times, began = [], time.perf_counter()
        theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0,
                        streamer=clock)
        seconds["theirs"].append(np.diff([began, *clock.times[1:]]))       # it shows the prompt first
    ratio = {}
    for name, of in (("prefill of 512 tokens", lambda x: x[:, 0]), ("decoding", lambda x: x[:, 1:])):
        ratio[name] = np.min(of(np.array(seconds["ours"]))) / np.min(of(np.array(seconds["theirs"])))
        measured[f"{name} in {dtype}, ours / transformers' seconds"] = ratio[name]
    assert max(ratio.values()) < 1.25        # about equal; results/smollm2.json has the figures of an idle machine


def test_smollm2_knows_the_capital_of_france(smollm2, capsys):
    assert generate.main(["--ckpt", str(smollm2), "--prompt", "The capital of France is", "--tokens", "12"]) == 0
    assert "The capital of France is Paris" in capsys.readouterr().out


def test_smollm2_is_retrofitted(smollm2, smollm2_pair, english, tmp_path, capsys):
    """All phases for a few steps; the loss at step 0 is the model's own, as transformers has it."""
    (tmp_path / "text").write_text(english[:200_000])
    steps = ["--free-steps", "2", "--retrofit-steps", "2", "--solidify-steps", "1", "--cr", "2", "--eval-sequences", "2"]
    assert train.main(["--init", str(smollm2), "--data", str(tmp_path / "text"), *steps, "--context", "64", "--batch", "2",
                       "--lr", "3e-5", "--out", str(tmp_path / "run")]) == 0
    s = train.Settings(**json.loads((tmp_path / "run/run.json").read_text())["settings"])
    x, y = train.batch(train.load_data(s, smollm2)[0], s, 0, "cpu")
    with torch.no_grad():
        expected = F.cross_entropy(smollm2_pair[1](x).logits.flatten(0, 1), y.flatten()).item()
    first = curve(tmp_path / "run")[0]
    assert first["phase"] == "free" and first["loss"] == pytest.approx(expected, abs=1e-4)
    shutil.rmtree(tmp_path / "run")


# ------------------------------------------------------------------------------------------------ dmc_fast.py

# With TRITON_INTERPRET=1 in the environment the kernels run on the CPU: `test_kernels_in_the_interpreter` starts a process that
# has it, for the tests marked `kernels` and for those of the cache, which run here too, without kernels. Tolerances are a
# multiple of the error that dmc.py makes in the same precision.

needs_triton = pytest.mark.skipif(dmc_fast.triton is None, reason="Triton is not installed")


def with_gradients(f, inputs, dtype):
    """f's outputs and the gradients of all inputs, for a fixed random gradient of the outputs (exact in bf16).
    dtype: what the inputs are converted to; None: they stay as they are."""
    inputs = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    rng = torch.Generator().manual_seed(0)
    slopes = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(torch.bfloat16).to(x) for x in out]
    grads = torch.autograd.grad(out, inputs, slopes, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*out, *grads)]


def assert_as_good(fast, plain, exact, factor=4):
    """Each of fast's tensors is as near to the exact one as `factor` times the plain one's error, or the dtype's rounding."""
    for i, (a, b, c) in enumerate(zip(fast, plain, exact, strict=True)):
        assert a.shape == c.shape and a.dtype == b.dtype and a.isfinite().all(), i
        error, allowed = ((x.double() - c.double()).abs().max().item() for x in (a, b))
        rounding = torch.finfo(a.dtype).eps * max(1.0, c.abs().max().item())
        assert error <= factor * (allowed + rounding), (i, error, allowed, rounding)


@pytest.fixture(scope="session", autouse=True)
def interpreter(request):
    """The process of `test_kernels_in_the_interpreter`, which runs beside all other tests: started first, waited for last."""
    process, wanted = None, any(item.name == "test_kernels_in_the_interpreter" for item in request.session.items)
    if wanted and dmc_fast.triton and not INTERPRETED:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "kernel", __file__]
        process = subprocess.Popen(command, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    yield process
    if process and process.poll() is None:
        process.kill()


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written is NaN."""
    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x
        return made
    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(place, name, poison(getattr(place, name)))


# ------------------------------------------------------------------------------------------------ fast attend

def attend_inputs(seed, heads, T, hard, silent, D=8):
    q, k, v, alpha, omega = qkv(seed, heads, T, D=D)
    if silent:
        q[..., 0] = k[..., 0] = 0
    return q, k, v, torch.log1p(-(alpha if hard else omega.clamp(max=0.999)) * (torch.arange(T) > 0))


@on_cpu
@given(seeds, groups, st.sampled_from([1, 2, 3, 17, 70]), st.booleans(), st.booleans())
def test_attend_and_its_gradients(seed, heads, T, hard, silent):
    inputs = attend_inputs(seed, heads, T, hard, silent)
    results = [with_gradients(f, inputs, torch.float64) for f in (dmc_fast.attend, dmc.attend)]
    for fast, exact in zip(*results, strict=True):
        assert (fast - exact).abs().max() < 1e-12


def check_attend(heads, T, hard, dtype, D, device="cpu"):
    """q, k, v as views of (B, T, heads, D), as the projections leave them; keep in fp32, as the model has it."""
    *inputs, keep = (x.to(device) for x in attend_inputs(0, heads, T, hard, True, D=D))
    inputs = [x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]      # all start from the same numbers

    def run(f, dtype, wide):
        *rest, dkeep = with_gradients(f, [*(x.to(dtype) for x in inputs), keep.float().to(wide)], None)
        return [*rest, dkeep.to(dtype)]          # which arrives in a channel of k, and has no more than its precision
    assert_as_good(run(dmc_fast.attend, dtype, torch.float32), run(dmc.attend, dtype, torch.float32),
                   run(dmc.attend, torch.float64, torch.float64))


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,hard", [((4, 4), True), ((4, 4), False), ((8, 2), False)])
def test_attend_is_as_precise_as_the_plain_computation(dtype, heads, hard):
    check_attend(heads, 130, hard, dtype, 64)


@kernels
@pytest.mark.parametrize("heads,T,hard,D", [((2, 2), 1, True, 8), ((3, 1), 2, False, 8), ((8, 2), 33, True, 20),
                                            ((8, 1), 40, False, 16), ((2, 2), 65, False, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_kernels(poisoned, heads, T, hard, D, dtype):
    check_attend(heads, T, hard, dtype, D)


@on_cpu
@pytest.mark.parametrize("kind", ["flash", "cudnn"])
def test_stock_kernels_of_a_gpu_take_what_they_are_given(kind):
    """Without a GPU: the arguments fit PyTorch's CUDA operators, and the results have the shapes that the CPU's have."""
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.zeros(2, n, 16, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2))
        y, lse, tensors, sizes = dmc_fast.flash(kind, q, k, v, 0.125)
        grads = dmc_fast.flash_backward(kind, y, q, k, v, y, lse, tensors, sizes, 0.125)
    assert lse.shape == (2, 8, 16) and lse.dtype == torch.float32
    for result, like in zip((y, *grads), (q, q, k, v), strict=True):
        assert result.shape == like.shape and result.dtype == like.dtype


@on_cpu
def test_attend_without_decisions_is_plain():
    q, k, v = qkv(0, (8, 2), 9)[:3]
    assert torch.equal(dmc_fast.attend(q, k, v), dmc.attend(q, k, v))


# ------------------------------------------------------------------------------------------------ fast accumulate

def accumulate_inputs(seed, T, hard, G=3, D=8):
    _, k, v, alpha, omega = qkv(seed, (G, G), T, D=D)
    if not hard:
        alpha = torch.rand(alpha.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        alpha[..., 0] = 0
    return [k, v, alpha, omega]


@on_cpu
@given(seeds, st.sampled_from([1, 2, 13, 32, 33, 70]), st.sampled_from([None, 1, 2, 3, 12, 32, 33, 100]), st.booleans())
def test_accumulate_and_its_gradients(seed, T, window, hard):
    inputs = accumulate_inputs(seed, T, hard)
    results = [with_gradients(lambda *x, f=f: f(*x, window), inputs, torch.float64)
               for f in (dmc_fast.accumulate, dmc.accumulate)]
    for fast, exact in zip(*results, strict=True):
        assert (fast - exact).abs().max() <= 1e-12 * max(1, exact.abs().max())


def check_accumulate(T, window, hard, dtype, D=8, G=2, device="cpu"):
    """k, v in `dtype`, as views of (B, T, G, D); decisions and importances in fp32, as the model has them."""
    k, v, alpha, omega = (x.to(device) for x in accumulate_inputs(1, T, hard, G=G, D=D))
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    k, v, alpha, omega = k.to(dtype).double(), v.to(dtype).double(), alpha.float().double(), omega.float().double()

    def run(f, dtype, wide):
        inputs = [k.to(dtype), v.to(dtype), alpha.to(wide), omega.to(wide)]
        return with_gradients(lambda *x: f(*x, window), inputs, None)
    assert_as_good(run(dmc_fast.accumulate, dtype, torch.float32), run(dmc.accumulate, dtype, torch.float32),
                   run(dmc.accumulate, torch.float64, torch.float64))


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 12, 100, None])
def test_accumulate_is_as_precise_as_the_plain_computation(dtype, window):
    check_accumulate(70, window, False, dtype)


@kernels
@pytest.mark.parametrize("dtype,T,window,hard,D", [
    (torch.float32, 1, 12, False, 8), (torch.float32, 2, 3, True, 8), (torch.float32, 13, 12, False, 8),
    (torch.float32, 33, 1, False, 8), (torch.float32, 35, 2, True, 20), (torch.float32, 33, 5, False, 64),
    (torch.float32, 9, 100, False, 8), (torch.bfloat16, 33, 4, True, 8), (torch.bfloat16, 40, 3, False, 8)])
def test_accumulate_kernels(poisoned, dtype, T, window, hard, D):
    check_accumulate(T, window, hard, dtype, D)


@kernels
@pytest.mark.parametrize("T,hard,D", [(1, True, 8), (67, False, 6)])
def test_whole_segment_kernel(poisoned, T, hard, D):
    k, v, alpha, omega = (x.float() for x in accumulate_inputs(2, T, hard, G=2, D=D))
    exact = dmc.accumulate(*(x.double() for x in (k, v, alpha, omega)))
    assert_as_good(dmc_fast.accumulate(k, v, alpha > 0.5 if hard else alpha, omega), dmc.accumulate(k, v, alpha, omega), exact)


# ------------------------------------------------------------------------------------------------ kernels: ragged decode

def paged(lengths, page, D, dtype):
    """Random keys and values of rows with so many slots: pools (pages + 1, page, D) in which no page is where one would expect
    it and what is not in use is NaN, and the rows' table."""
    pages, rng = -(-lengths // page), torch.Generator(lengths.device).manual_seed(0)
    total, nth = int(pages.sum()), torch.arange(int(pages.max()) + 1, device=lengths.device)
    order = torch.randperm(total, generator=rng, device=lengths.device).int()
    at = (pages.cumsum(0) - pages)[:, None] + nth
    table = torch.where(nth < pages[:, None], order[at.clamp(max=total - 1)], total)
    pools = [torch.randn(total + 1, page, D, generator=rng, device=lengths.device, dtype=dtype) for _ in range(2)]
    last = table.gather(1, (pages[:, None] - 1).clamp(min=0).long())[:, 0]
    unused = ((pages - 1) * page)[:, None] + torch.arange(page, device=lengths.device) >= lengths[:, None]
    for pool in pools:
        pool[last] = torch.where(unused[..., None], torch.nan, pool[last])
        pool[total] = torch.nan
    return *pools, table


def check_decode(lengths, R, D, page, splits, dtype):
    lengths = lengths.int()
    pool_k, pool_v, table = paged(lengths, page, D, dtype)
    q = torch.randn(len(lengths), R, D, generator=torch.Generator(lengths.device).manual_seed(1), device=lengths.device)
    q, used = q.to(dtype), torch.arange(table.size(1) * page, device=q.device) < lengths[:, None]
    used, plain, exact = used[:, None], [], []
    for wide, out in ((dtype, plain), (torch.float64, exact)):
        k, v = (pool[table].flatten(1, 2).to(wide).nan_to_num() for pool in (pool_k, pool_v))
        scores = (q.to(wide) @ k.mT / D ** 0.5).masked_fill(~used, -torch.inf)
        out.append(scores.softmax(-1).nan_to_num() @ v)
    results = [dmc_fast.decode(q, pool_k, pool_v, table, lengths, order.int(), splits)
               for order in (lengths.argsort(descending=True), torch.arange(len(lengths), device=q.device))]
    assert_as_good(results[:1], plain, exact)
    assert torch.equal(*results) and (results[0][lengths == 0] == 0).all()


@kernels
@pytest.mark.parametrize("R,D,page,splits,dtype", [(1, 128, 16, 1, torch.float32), (3, 64, 32, 3, torch.float32),
                                                   (4, 64, 16, 2, torch.float16), (8, 64, 64, 1, torch.float16)])
def test_ragged_decode_kernel(poisoned, R, D, page, splits, dtype):
    """In fp16 for want of bf16, whose products the interpreter gets wrong."""
    check_decode(torch.tensor([0, 1, page - 1, page, page + 1, 3 * page + 5]), R, D, page, splits, dtype)


# ------------------------------------------------------------------------------------------------ the paged cache

def check_cache(heads, window, T, portions, D=8, page_size=16, decides=True, batch=1, merge=0.5, dtype=torch.float32,
                device="cpu"):
    """The same tokens, in portions, into both caches: outputs, lengths, the open segment, the slots."""
    config = config_of(heads, window, head_dim=D, dmc=decides, n_layer=2, max_seq_len=max(64, T))
    *inputs, alpha, omega = (x.to(device) for x in qkv(5, heads, T, batch, D, merge))
    inputs = [*(x.to(dtype) for x in inputs), alpha.float(), omega.float()]
    caches = [dmc.Cache(config, batch, device, dtype), dmc_fast.PagedCache(config, batch, device, dtype, page_size),
              dmc.Cache(config, batch, device, torch.float64)]
    shuffled = torch.randperm(len(caches[1].free), generator=torch.Generator().manual_seed(0))
    caches[1].free = caches[1].free[shuffled.to(device)]
    results = []
    for cache in caches:
        mine = [x.double() if cache is caches[2] else x for x in inputs][:None if decides else 3]
        results.append([cache.attend(1, *part) for part in zip(*(x.split(portions, dim=2) for x in mine), strict=True)])
    plain, fast, exact = results
    assert_as_good(fast, plain, exact)
    plain, fast, exact = caches
    assert (plain.lengths == fast.lengths).all() and plain.seen == fast.seen
    assert fast.bytes.used == plain.bytes.used
    assert fast.compression_ratio == pytest.approx(alpha.numel() / plain.lengths.sum().item())
    assert_as_good(*([c.open_k, c.open_v, c.open_omega] for c in caches))
    return caches


@pytest.mark.parametrize("heads,window,portions,D,decides,merge", [
    ((3, 1), 3, [1] * 19, 8, True, 0.8), ((4, 1), None, [1] * 4, 64, True, 0.5), ((8, 1), 12, [17, 1, 1], 8, True, 0.1),
    ((2, 2), None, [16, 1, 2], 8, True, 0.0), ((2, 1), 2, [6, 1, 1, 1, 1], 8, True, 0.9),
    ((1, 1), 1, [15, 1, 1], 128, True, 0.5), ((2, 2), 12, [15, 1, 1], 8, False, 0.0)])
def test_paged_cache_kernel(poisoned, heads, window, portions, D, decides, merge):
    plain, fast, _ = check_cache(heads, window, sum(portions), portions, D, decides=decides, merge=merge)
    assert fast.kernels == INTERPRETED
    fast.check()
    for g in range(heads[1]):
        for mine, theirs in zip(slots_of(fast, 1, 0, g), slots_of(plain, 1, 0, g), strict=True):
            assert (mine - theirs).abs().max() < 1e-5


def owned_pages(cache):
    owned = -(-cache.lengths // cache.page_size)
    return cache.table[torch.arange(cache.table.size(-1)) < owned[..., None]].tolist()


def test_pages_run_out_and_come_back_kernel(poisoned):
    """No page is owned twice or lost; an exhausted pool is reported, and nobody's slots change; released pages serve anew."""
    config = config_of((2, 2), 3, n_layer=1)
    q, k, v, alpha, omega = (x.float() for x in qkv(0, (2, 2), 40, merge=0.0))
    cache = dmc_fast.PagedCache(config, 2, pages=7)
    everything = list(range(7))

    def conserved():
        left = max(0, cache.left.item())
        return sorted([p for p in owned_pages(cache) if p < 7] + cache.free[:left].tolist()) == everything

    cache.attend(0, *(x[:, :, :16] for x in (q, k, v, alpha, omega)))
    assert cache.left.item() == 3 and conserved()
    before = cache.pool_k[:7].clone()
    owned = owned_pages(cache)
    cache.attend(0, *(x[:, :, 16:17] for x in (q, k, v, alpha, omega)))
    assert (before[owned] == cache.pool_k[owned]).all() and conserved()
    with pytest.raises(InputError, match="7 pages are used up"):
        cache.check()
    cache.check()                                                # reported once
    cache.release([0])
    assert conserved() and (cache.lengths[:, 0] == 0).all()
    part = cache.admit(slice(0, 1))
    y = part.attend(0, *(x[:1, :, :9] for x in (q, k, v, alpha, omega)))
    z = part.attend(0, *(x[:1, :, 9:10] for x in (q, k, v, alpha, omega)))
    reference = dmc.Cache(config, 1)
    expected = reference.attend(0, *(x[:1, :, :10] for x in (q, k, v, alpha, omega)))
    assert (torch.cat([y, z], 2) - expected).abs().max() < 1e-5 and conserved()
    part.check()
    cache.release([1])
    cache.attend(0, *(x[:, :, 10:11] for x in (q, k, v, alpha, omega)))      # the released one does nothing
    assert cache.lengths[0, :, 0].tolist() == [11, 0] and conserved()
    cache.release([0])
    assert cache.left.item() == 7 and conserved()


def test_a_prompt_too_long_for_the_pool_kernel(poisoned):
    q, k, v, alpha, omega = (x.float() for x in qkv(0, (2, 2), 40, merge=0.0))
    cache = dmc_fast.PagedCache(config_of((2, 2), 3, n_layer=1), 2, pages=5)
    cache.attend(0, q, k, v, alpha, omega)
    with pytest.raises(InputError, match="used up"):
        cache.check()
    pages = [p for p in owned_pages(cache) if p < 5]
    assert sorted(pages) == list(range(5))                       # all taken, none twice
    cache.release([0, 1])
    assert sorted(cache.free[:cache.left.item()].tolist()) == list(range(5))


def test_an_admitted_sequence_knows_nothing_of_the_one_before_it_kernel():
    """A prompt shorter than the window, merged into from the first step, where a longer segment was open."""
    config = config_of((1, 1), 12, n_layer=1)
    before, after = ([x.float()[:1] for x in qkv(seed, (1, 1), 20, merge=1.0)] for seed in (0, 1))
    cache = dmc_fast.PagedCache(config, 1, pages=3)
    cache.attend(0, *before)
    cache.release(slice(0, 1))
    part, reference = cache.admit(slice(0, 1)), dmc.Cache(config, 1)
    for portion in zip(*(x[:, :, :6].split([2, 1, 1, 1, 1], dim=2) for x in after), strict=True):
        assert (part.attend(0, *portion) - reference.attend(0, *portion)).abs().max() < 1e-5


@settings(max_examples=12 if INTERPRETED else 60)
@given(st.data())
def test_sequences_come_and_go_kernel(data):
    """Prefill, decode, finish, admit, exhaust, in any order, against one reference each; no page lost or doubled."""
    config = config_of((1, 1), data.draw(st.sampled_from([None, 3])), n_layer=1)
    cache, pages, references, at = dmc_fast.PagedCache(config, 2, pages=3), [0, 1, 2], {}, 0
    tokens = [x.float() for x in qkv(data.draw(seeds), (1, 1), 300, merge=0.1)]
    cache.release([0, 1])
    for _ in range(data.draw(st.integers(3, 8))):
        row = data.draw(st.sampled_from([0, 1]))
        if row not in references:
            n = data.draw(st.sampled_from([2, 16, 17, 33]))
            part = [x[:1, :, at:at + n].clone() for x in tokens]
            part[3][..., 0] = 0
            references[row] = dmc.Cache(config, 1)
            y, z = (c.attend(0, *part) for c in (cache.admit(slice(row, row + 1)), references[row]))
            assert (y - z).abs().max() < 1e-5
            at += n
        elif data.draw(st.booleans()):
            cache.release([row])
            del references[row]
        else:
            part = [x[:, :, at:at + 1].clone() for x in tokens]
            y = cache.attend(0, *part)
            for i, reference in references.items():
                z = reference.attend(0, *(x[i:i + 1] for x in part))
                if not cache.failed.item():
                    assert (y[i:i + 1] - z).abs().max() < 1e-5
            at += 1
        for i, reference in references.items():
            assert cache.lengths[0, i] == reference.lengths[0, 0] and cache.ages[0, i, 0] == reference.seen[0]
        mine = [p for p in owned_pages(cache) if p < 3] + cache.free[:max(0, cache.left.item())].tolist()
        assert sorted(mine) == pages
        with contextlib.suppress(InputError):
            cache.check()
            continue
        cache.release([0, 1])                                    # what exhausts the pool ends the batch
        references.clear()
    cache.release([0, 1])
    assert sorted(cache.free.tolist()) == pages and cache.left.item() == 3


@on_cpu
@pytest.mark.parametrize("window", [None, 3])
def test_model_with_fast_ops(window):
    """The whole model: logits, decisions, every parameter's gradient, and what the cache gives."""
    torch.manual_seed(0)
    plain = dmc.Transformer(config_of((8, 2), window, c=0.0)).double()
    fast = dmc.Transformer(plain.config, ops=dmc_fast).double()
    fast.load_state_dict(plain.state_dict())
    tokens = torch.randint(0, 29, (2, 21))
    results = []
    for model in (plain, fast):
        torch.manual_seed(1)
        logits, alpha = model(tokens, noise=True)
        (logits.square().mean() + dmc.compression_loss(alpha, 4)).backward()
        with torch.no_grad():
            cache = model.Cache(model.config, 2, dtype=torch.float64)
            cached = torch.cat([model(x, cache)[0] for x in tokens.split([15, 1, 5], dim=1)], dim=1)
        results.append([logits, alpha, cached, cache.lengths, *(p.grad for p in model.parameters())])
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------------ on a GPU: `-k gpu`

# Without a GPU the same tests run at toy size in Triton's interpreter, so that they are ready when there is one.
GPU = torch.cuda.is_available()
DEVICE, HALF = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)      # the interpreter gets bf16 products wrong
on_gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
on_gpu_or_interpreted = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs an NVIDIA GPU, or Triton's interpreter")
full_size = lambda real, toy: real if GPU else toy


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("G,D,window,hard", [(32, 128, 12, False), (32, 128, 12, True), (8, 128, 12, False), (32, 64, 5, False),
                                             (32, 128, None, True)])
def test_accumulate_at_full_size_gpu(G, D, window, hard, dtype):
    check_accumulate(4096, window, hard, dtype, D, G, DEVICE)


@on_gpu
@pytest.mark.parametrize("heads,T,D,hard", [
    ((32, 32), 2048, 128, False), ((32, 32), 2048, 128, True), ((16, 2), 2048, 128, False), ((8, 1), 4096, 128, False),
    ((12, 4), 1000, 64, False), ((4, 4), 1, 128, True)])
def test_attend_at_full_size_gpu(heads, T, D, hard):
    check_attend(heads, T, hard, torch.bfloat16, D, DEVICE)


@on_gpu
@pytest.mark.parametrize("R,D,page,splits", [(1, 128, 16, 1), (1, 128, 16, 16), (8, 128, 16, 3), (3, 64, 32, 2),
                                             (4, 64, 64, 1)])
def test_ragged_decode_at_full_size_gpu(R, D, page, splits):
    lengths = torch.randint(0, 4096, (250,), generator=torch.Generator().manual_seed(0))
    lengths[:6] = torch.tensor([0, 1, page - 1, page, page + 1, 4096])
    check_decode(lengths.to(DEVICE), R, D, page, splits, torch.bfloat16)


@on_gpu
@pytest.mark.parametrize("heads,window,batch,portions,merge", [
    ((32, 32), 12, 1, [300] + [1] * 40, 0.75), ((32, 32), None, 2, [300] + [1] * 20, 0.5),
    ((64, 8), 12, 3, [200] + [1] * 20, 0.9), ((32, 32), 12, 250, [40] + [1] * 20, 0.75), ((32, 32), 12, 4, [1] * 40, 0.3)])
def test_cache_at_full_size_gpu(heads, window, batch, portions, merge):
    check_cache(heads, window, sum(portions), portions, 128, 16, True, batch, merge, torch.bfloat16, DEVICE)


@on_gpu
@torch.no_grad()
def test_a_step_is_one_graph_gpu():
    """No step waits for the GPU, and replays of a captured one give the bits that the step itself gives."""
    torch.manual_seed(0)
    config = config_of((8, 2), 12, head_dim=64, dim=256, max_seq_len=256, c=0.0)
    model = Transformer(config, dmc_fast).to(DEVICE, torch.bfloat16)
    tokens = torch.randint(0, 29, (4, 60), device=DEVICE)
    eager, captured = (dmc_fast.PagedCache(config, 4, DEVICE, torch.bfloat16) for _ in range(2))
    for cache in (eager, captured):
        model(tokens[:, :20], cache)
    token, results = tokens[:, 20:21].clone(), []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(20, 60):
            token.copy_(tokens[:, t:t + 1])
            results.append(model(token, eager)[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, _ = model(token, captured)
    for t in range(20, 60):
        token.copy_(tokens[:, t:t + 1])
        graph.replay()
        assert torch.equal(logits, results[t - 20])
    assert torch.equal(eager.lengths, captured.lengths) and eager.lengths.sum() < 60 * eager.lengths.numel()
    captured.check()


def seconds(f):
    """Of one call: on a GPU the median, with its L2 cache flushed before each; elsewhere those of one call."""
    if GPU:
        return dmc_fast.triton.testing.do_bench(f, warmup=50, rep=300, return_mode="median") / 1e3
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


@pytest.fixture(scope="session")
def note(measured):
    """Takes down a figure, and the bar it is held against, without judging: what falls short is for a person to explain."""
    def noted(name, value, bar=None):
        measured[name] = value if bar is None else {"measured": value, "bar": bar}
        print(f"\n{name:90} {value:10.4g}" + ("" if bar is None else f"   bar {bar}"), end="")
    return noted


@pytest.fixture(scope="session")
def copying(note):
    """Bytes per second, read and written, of copying a tensor that no cache holds."""
    x, y = (torch.randn(full_size(2 ** 30, 2 ** 16), device=DEVICE) for _ in range(2))
    speed = 2 * x.nbytes / seconds(lambda: y.copy_(x))
    note("copy bandwidth, TB/s", speed / 1e12)
    return speed


def poolsum():
    """The authors' pooling, from their file that DMC_MEGATRON names; None without."""
    if "DMC_MEGATRON" not in os.environ:
        return None
    source, names = Path(os.environ["DMC_MEGATRON"]).read_text(), {"torch": torch, "F": F}
    code = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "_poolsum")
    exec("@torch.compile\n" + ast.get_source_segment(source, code), names)
    return names["_poolsum"]


@on_gpu_or_interpreted
def test_speed_of_accumulate_kernels_gpu(copying, note):
    B, G, T, D = full_size((8, 32, 4096, 128), (1, 2, 40, 16))
    torch.manual_seed(0)
    k, v = (torch.randn(B, T, G, D, device=DEVICE, dtype=HALF).transpose(1, 2).requires_grad_() for _ in range(2))
    alpha = torch.sigmoid(torch.randn(B, G, T, device=DEVICE) * 20).requires_grad_()
    omega = torch.rand(B, G, T, device=DEVICE).requires_grad_()
    slopes, size = [torch.randn_like(k) for _ in range(2)], k.nbytes
    forward = lambda: dmc_fast.accumulate(k, v, alpha, omega, 12)
    both_ways = lambda: torch.autograd.grad(forward(), (k, v, alpha, omega), slopes)
    times = {"forward": seconds(forward), "forward and backward": seconds(both_ways)}
    for (name, t), passes in zip(times.items(), (4, 10), strict=True):       # forward k, v, k~, v~; backward reads 4, writes 2
        note(f"accumulate {name}: share of copy bandwidth", passes * size / t / copying, 0.75)
    with torch.no_grad():
        note("accumulate without a window: share of copy bandwidth",
             4 * size / seconds(lambda: dmc_fast.accumulate(k, v, alpha, omega)) / copying)
    if pool := poolsum():
        k32, v32, b, w = (x.detach().float().flatten(0, 1).contiguous().requires_grad_() for x in (k, v, alpha[..., 1:], omega))
        s32 = [x.float().flatten(0, 1) for x in slopes]
        theirs = lambda: (pool(k32, b, w), pool(v32, b, w))
        note("accumulate forward: the authors' time / ours", seconds(theirs) / times["forward"], 5)
        note("accumulate forward and backward: the authors' time / ours",
             seconds(lambda: torch.autograd.grad(theirs(), (k32, v32, b, w), s32)) / times["forward and backward"], 5)


@on_gpu_or_interpreted
@pytest.mark.parametrize("H,G", [(32, 32), (64, 8)])
def test_speed_of_attend_kernels_gpu(note, H, G):
    (B, T, D), (H, G) = full_size((2, 4096, 128), (1, 33, 16)), full_size((H, G), (H // 16, max(1, G // 16)))
    q, k, v = (torch.randn(B, T, n, D, device=DEVICE, dtype=HALF).transpose(1, 2) for n in (H, G, G))
    q[..., 0] = k[..., 0] = 0
    keep = F.logsigmoid(torch.randn(B, G, T, device=DEVICE) * 20)
    inputs, slope = [x.requires_grad_() for x in (q, k, v, keep)], torch.randn_like(q)
    times = [(seconds(f), seconds(lambda f=f, n=n: torch.autograd.grad(f(), inputs[:n], slope))) for f, n in (
        (lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G), 3),
        (lambda: dmc_fast.attend(q, k, v, keep), 4))]
    name = f"attend, {H} heads over {G}, T {T}, by {dmc_fast.stock(q, k, v)}"
    note(f"{name}: forward, in plain attention's time", times[1][0] / times[0][0])
    note(f"{name}: forward and backward, in plain attention's time", times[1][1] / times[0][1], 1.15)


def flashinfer_decode(q, pools, lengths, table):
    """FlashInfer's paged decode over the same pages, as a function of nothing; None without the library."""
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except ImportError:
        return None
    R, D, page, pages = *q.shape[1:], pools[0].size(1), -(-lengths // pools[0].size(1))
    starts = F.pad(pages.cumsum(0), (1, 0)).int()
    names = table[torch.arange(table.size(1), device=q.device) < pages[:, None]]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(2 ** 27, dtype=torch.uint8, device=q.device), "NHD")
    wrapper.plan(starts, names, ((lengths - 1) % page + 1).int(), R, 1, D, page, q_data_type=q.dtype, kv_data_type=q.dtype)
    return lambda: wrapper.run(q, tuple(pool[:, :, None] for pool in pools))


@on_gpu_or_interpreted
@pytest.mark.parametrize("cr,batch", [(1, 31), (4, 125), (8, 251)])
def test_speed_of_a_decode_step_kernels_gpu(copying, note, cr, batch):
    """One layer of Llama 2 7B at the largest batch: 3,584 tokens per sequence, each head with a CR of its own."""
    batch, G, tokens, D = full_size((batch, 32, 3584, 128), (2, 2, 40, 16))
    rng = torch.Generator().manual_seed(0)
    part = (torch.randn(G, generator=rng) * 0.7 * (cr > 1)).exp()
    lengths = (tokens * (part / part.mean() / cr).clamp(max=1)).int().repeat(batch).clamp(min=1).to(DEVICE)
    *pools, table = paged(lengths, 16, D, HALF)
    q = torch.randn(len(lengths), 1, D, device=DEVICE, dtype=HALF)
    order = lengths.argsort(descending=True).int()
    decode = partial(dmc_fast.decode, q, *pools, table, lengths, order, 1)
    attention = seconds(decode)
    name, size = f"decode at CR {cr}, batch {batch}", 2 * int(lengths.sum()) * D * q.element_size()
    note(f"{name}: share of copy bandwidth", size / attention / copying, 0.88)
    if peer := flashinfer_decode(q, pools, lengths, table):
        assert (peer().float() - decode().float()).abs().max() < 0.02
        note(f"{name}: FlashInfer's time / ours", seconds(peer) / attention, 1)
    config = config_of((G, G), 12, head_dim=D, n_layer=1, max_seq_len=full_size(65536, 64))
    cache = dmc_fast.PagedCache(config, batch, DEVICE, HALF, pages=2 * batch * G)
    token = torch.randn(batch, G, 1, D, device=DEVICE, dtype=HALF)
    merge, weight = (torch.ones(batch, G, 1, device=DEVICE) for _ in range(2))
    timer = dmc_fast.triton.testing.do_bench_cudagraph if GPU else lambda f: 1e3 * seconds(f)
    update = timer(lambda: cache._update_in_kernel(0, token, token, token, merge, weight)) / 1e3
    note(f"{name}: cache update, in the attention's time", update / attention, 0.05)


@on_gpu
@torch.no_grad()
def test_speed_of_prefill_gpu(note):
    """2,048 tokens of 8 sequences into the caches of 4 layers of Llama 2 7B, with decisions and without."""
    models = [generate.random_model("llama2-7b", dmc_fast, DEVICE, n_layer=4, dmc=decides, c=0.0) for decides in (True, False)]
    tokens = torch.randint(0, 32000, (8, 2048), device=DEVICE)
    times = [seconds(lambda m=m: m(tokens, m.Cache(m.config, 8, DEVICE, HALF), last=True)) for m in models]
    note("prefill of 2,048 tokens, in the uncompressed model's time", times[0] / times[1], 1.1)


@on_cpu
@pytest.mark.skipif(GPU, reason="is about machines without a GPU")
def test_speed_without_a_gpu(note):
    """dmc_fast.py on a CPU. One round unless DMC_RESULTS asks for figures, which are medians of many."""
    rounds = 40 if "DMC_RESULTS" in os.environ else 1

    def compare(candidates):
        taken = {name: [] for name in candidates}
        for _ in range(rounds):                                  # in turns, because the machine's speed drifts
            for name, f in candidates.items():
                taken[name].append(seconds(f))
        return {name: np.median(times) for name, times in taken.items()}

    T, D = 1024, 64
    for H, G in ((8, 8), (8, 2)):
        q, k, v, keep = attend_inputs(0, (H, G), T, False, True, D)
        inputs, slope = [x[:1].float().requires_grad_() for x in (q, k, v, keep)], torch.ones(1, H, T, D)
        taken = compare({name: lambda f=f, x=inputs[:n], slope=slope: torch.autograd.grad(f(*x), x, slope)
                        for name, f, n in (("plain", dmc.attend, 3), ("mask", dmc.attend, 4), ("fast", dmc_fast.attend, 4))})
        name = f"attend on the CPU, {H} heads over {G}, T {T}, forward and backward"
        note(f"{name}, in plain attention's time", taken["fast"] / taken["plain"], 1.2)
        note(f"{name}, in plain attention's time, with an explicit mask", taken["mask"] / taken["plain"])
    inputs = [x[:1].float().requires_grad_() for x in accumulate_inputs(0, T, False, 8, D)]
    taken = compare({ops.__name__: lambda ops=ops: torch.autograd.grad(ops.accumulate(*inputs, 12), inputs, [slope, slope])
                    for ops in (dmc, dmc_fast)})
    note("accumulate on the CPU, 8 heads, T 1024, forward and backward: dmc.py's time / dmc_fast.py's",
         taken["dmc"] / taken["dmc_fast"])
    s = train.Settings()
    retrofit = next(phase for phase in train.plan(s) if phase.name == "retrofit")
    pretrain, x, steps = train.plan(s)[0], torch.randint(0, 256, (s.batch, s.context)), {}
    for name, ops, phase in (("plain", dmc_fast, pretrain), ("reference", dmc, retrofit), ("fast", dmc_fast, retrofit)):
        model = Transformer(train.replace(s.small_config(), **s.method(phase.dmc)), ops)
        steps[name] = partial(train.train_step, model, train.new_optimizer(model, s), phase, 20, [(1, x, x)], s)
    taken = compare(steps)
    note("a DMC step of the laptop run, in a plain step's time, with dmc.py", taken["reference"] / taken["plain"])
    note("a DMC step of the laptop run, in a plain step's time, with dmc_fast.py", taken["fast"] / taken["plain"])
    note("a DMC step of the laptop run: dmc.py's time / dmc_fast.py's", taken["reference"] / taken["fast"])


# ------------------------------------------------------------------------------------------------ kernels: compiled for an H100

MODEL = dict(D=128, D_PAD=128, W=12, TILE=32)               # Llama 2 7B; the group of 8 is Llama 2 70B's
GROUPED = dict(R=1, D=128, D_PAD=128, TILE=16)
KERNELS = {
    "mask_kernel": (GROUPED, {}),
    "restore_kernel": (GROUPED, {}),
    "mask_gradient_kernel": (GROUPED, {}),
    "average_kernel": (MODEL, {}),
    "share_gradient_kernel": (MODEL, {}),
    "spread_kernel": (MODEL, {}),
    "decision_gradient_kernel": (dict(W=12, TILE=256), {}),
    "segment_average_kernel": (dict(D=128, SLICE=32, TILE=64), {}),
    "step_kernel": (dict(R=1, HALF=64, W=12, W_PAD=16, PAGE=16, WINDOWED=True, DECIDES=True, CONTROL_GAIN=0.0),
                    dict(num_warps=1)),
    "decode_kernel": (dict(R=1, R_PAD=16, D=128, PAGE=16, BLOCK=64), {}),
    "combine_kernel": (dict(R=1, D=128), {}),
}
FP32 = {"alpha", "omega", "cos", "sin", "open_omega", "inverse_z", "dshare", "mean_dshare", "dalpha", "domega", "out_lse",
        "part", "part_lse", "lse", "keep", "dkeep", "diagonal"}
INT32 = {"table", "lengths", "ages", "free", "left", "failed", "order"}
NUMBERS = {"T", "G", "spare", "pages_per_row", "splits"}


def is_stride(name):
    return "stride" in name or name.endswith(("_b", "_h", "_t"))


def argument_type(name, constants):
    if name in constants:
        return "constexpr"
    if name in NUMBERS or is_stride(name):
        return "i32"
    return "fp32" if name == "scale" else "*fp32" if name in FP32 else "*i32" if name in INT32 else "*bf16"


@needs_triton
@on_cpu
@pytest.mark.parametrize("name,changes", [(name, {}) for name in KERNELS] + [
    ("mask_kernel", dict(R=8)), ("restore_kernel", dict(R=8)), ("mask_gradient_kernel", dict(R=8)),
    ("step_kernel", dict(R=8)), ("step_kernel", dict(W=1, W_PAD=1, WINDOWED=False)), ("step_kernel", dict(DECIDES=False)),
    ("step_kernel", dict(G=1, spare=1)), ("decode_kernel", dict(splits=1)),              # Triton compiles the number 1 in
    ("decode_kernel", dict(R=8)), ("decode_kernel", dict(D=64, R=4)), ("average_kernel", dict(D=64, D_PAD=64))])
def test_compiles_for_an_h100(name, changes, tmp_path):
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    constants, options = {**KERNELS[name][0], **changes}, KERNELS[name][1]
    kernel = getattr(dmc_fast, name)
    signature = {n: argument_type(n, constants) for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if signature[n].startswith("*") or is_stride(n)}
    binary = compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    report = subprocess.run([Path(nvidia.__file__).parent / "bin/cuobjdump", "--dump-resource-usage", cubin],
                            capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{kind}:(\d+)", report)[1]) for kind in ("REG", "STACK", "LOCAL"))
    spills = stack + local                                   # bytes per thread in memory that belong into registers
    print(f"\n{name:26} {changes} registers {registers} shared memory {binary.metadata.shared} spills {spills}", end="")
    assert spills == 0 and binary.metadata.shared <= 227 * 1024


# ------------------------------------------------------------------------------------------------ the whole

def test_worked_example():
    printed = subprocess.run([sys.executable, HERE / "dmc.py"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "compression ratio" in printed and float(printed.split()[-1].rstrip(".")) < 1e-6


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_help_names_every_flag(script):
    shown = subprocess.run([sys.executable, HERE / script, "--help"], capture_output=True, text=True, check=True).stdout
    flags = [train.flag(f.name) for f in train.fields(train.Settings)] if script == "train.py" else ["--ckpt", "--show-merges"]
    assert all(flag in shown for flag in flags)


def test_readme_quotes_what_was_measured():
    readme, measured = (HERE / "README.md").read_text(), json.loads((HERE / "results/laptop.json").read_text())
    assert train.table(measured).strip() in readme and train.heat_map(measured["dmc"][-1]["heads"]).strip() in readme
    for field in train.fields(train.Settings):       # measured with the defaults that the code has now
        assert measured["settings"][field.name] == field.default


@needs_triton
@on_cpu
def test_kernels_in_the_interpreter(interpreter):
    printed, _ = interpreter.communicate()
    assert interpreter.returncode == 0 and " passed" in printed, printed[-4000:]
