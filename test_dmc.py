"""The paper's claims as properties, over dmc.py and dmc_fast.py: pytest + hypothesis.

The oracles stand first. They are written from the paper's text, token by token, in numpy and fp64,
and share no code with what they check. tests/ has a file for each module of nanodmc/ and for the
two commands, and takes its helpers from here.
"""

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dmc
import dmc_fast
from dmc import Config, Transformer
from nanodmc.launch import INTERPRETED, triton

HERE = Path(__file__).parent
settings.register_profile(
    "dmc", deadline=None, max_examples=25, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("dmc")
torch.set_num_threads(2)

# With TRITON_INTERPRET=1 in the environment the kernels run on the CPU. A process that has it is
# started by `interpreter`; it runs all tests with "kernel" in their names.
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
on_cpu = pytest.mark.skipif(
    INTERPRETED, reason="PyTorch's operations are tested without the interpreter")
kernels = pytest.mark.skipif(
    not INTERPRETED, reason="runs in the process that test_kernels_in_the_interpreter waits for")


@pytest.fixture(scope="module", autouse=True)
def one_thread_here():
    """Tensors here are so small that a second thread only delays."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


# ------------------------------------------------------------------------------------- oracles

def literal_accumulate(x, alpha, omega, window):
    """Eq. 9 of one head, literally. x (T, D); alpha, omega (T,).

    With a window each token runs the recurrence anew, from an empty state, over the last `window`
    tokens.
    """
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
    angle = position * theta ** (-2 * np.arange(half) / len(x))
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag])


def literal_attention(query, keys, values):
    scores = np.array([query @ key for key in keys]) / math.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights @ np.array(values) / weights.sum()


def literal_algorithm1(q, k, v, alpha, omega, window, theta, silent=True):
    """Algorithm 1 of one key-value head: the outputs (R, T, D) and the number of slots.

    q (R, T, D): the R query heads of its group; k, v (T, D); alpha in {0, 1}, omega (T,). A segment
    is a list of tokens; its slot is the weighted average over the last `window` of them, rotated at
    the latest.
    """
    def rotated(x, position):
        x = x.copy()
        x[0] *= not silent
        x = literal_rotate(x, position, theta)
        x[0] *= not silent
        return x

    def means(x, tokens):
        return [(omega[s][:, None] * x[s]).sum(0) / omega[s].sum() for s in tokens]

    R, T, D = q.shape
    segments, out = [], np.zeros_like(q)
    for t in range(T):
        if t > 0 and alpha[t] == 1:
            segments[-1].append(t)
        else:
            segments.append([t])
        recent = [s if window is None else s[-window:] for s in segments]
        keys = [rotated(key, s[-1]) for key, s in zip(means(k, recent), recent, strict=True)]
        values = means(v, recent)
        for r in range(R):
            out[r, t] = literal_attention(rotated(q[r, t], t), keys, values)
    return out, len(segments)


def literal_llama(model, tokens):
    """Logits (T, vocab) of a plain Llama for one sequence, from the weights alone."""
    w = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    c, T = model.config, len(tokens)
    norm = lambda x, weight: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.norm_eps) * weight
    turned = lambda x, t: literal_rotate(x, t, c.rope_theta)
    x = w["embed_tokens.weight"][tokens]
    for i in range(c.n_layer):
        part = lambda name, i=i: w[f"layers.{i}.{name}.weight"]
        h = norm(x, part("input_layernorm"))
        q, k, v = ((h @ part(f"self_attn.{name}_proj").T).reshape(T, -1, c.head_dim)
                   for name in "qkv")
        y = np.zeros_like(q)
        for head in range(c.n_head):
            g = head // (c.n_head // c.n_kv_head)
            keys = [turned(k[t, g], t) for t in range(T)]
            for t in range(T):
                y[t, head] = literal_attention(turned(q[t, head], t), keys[:t + 1], v[:t + 1, g])
        x = x + y.reshape(T, -1) @ part("self_attn.o_proj").T
        h = norm(x, part("post_attention_layernorm"))
        gate = h @ part("mlp.gate_proj").T
        up = h @ part("mlp.up_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ part("mlp.down_proj").T
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


# -------------------------------------------------------------------------------- drawn inputs

both = pytest.mark.parametrize("ops", [dmc, dmc_fast], ids=["reference", "fast"])
windows = st.sampled_from([None, 1, 2, 3, 12, 100])
lengths = st.sampled_from([1, 2, 3, 7, 13, 17, 30])
groups = st.sampled_from([(4, 4), (3, 1), (8, 2), (6, 2), (1, 1)])     # (H, G)
seeds = st.integers(0, 10_000)


def config_of(heads=(4, 4), window=12, **changes):
    H, G = heads
    small = dict(vocab_size=29, n_layer=2, n_head=H, n_kv_head=G, dim=4 * H, head_dim=8, ffn_dim=24,
                 max_seq_len=64, window=window, c=0.5)
    return Config(**{**small, **changes})


def qkv(seed, heads, T, B=2, D=8, merge=None):
    """Random q, k, v, decisions in {0, 1} and importances, fp64. merge: a merge's probability."""
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


def control_rows(model):
    """The rows of the q and k projections that feed the control channels, of every layer."""
    return [p[::model.config.head_dim] for layer in model.layers
            for p in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)]


def parallel_form(ops, q, k, v, alpha, omega, config):
    """The training form on decisions that are given: Eq. 9, rotation, the mask."""
    k, v = ops.accumulate(k, v, alpha, omega, config.window)
    angles = dmc.rotary_table(config, q.size(2))
    q, k = (dmc.rotate_heads(x, *angles, 0.0) for x in (q, k))
    return ops.attend(q, k, v, torch.log1p(-alpha))


def parts(inputs, portions):
    """Tensors (B, heads, T, ...) cut along T: a tuple of them for each of the portions."""
    return zip(*(x.split(portions, dim=2) for x in inputs), strict=True)


def through_cache(model, tokens, split, **kwargs):
    """Logits of a model whose cache takes the tokens in portions of the given sizes; the cache."""
    cache = model.Cache(model.config, len(tokens), dtype=torch.float64)
    logits = [model(part, cache, **kwargs)[0] for part in tokens.split(split, dim=1)]
    return torch.cat(logits, dim=1), cache


def slots_of(cache, layer, b, g):
    """The keys and the values in the slots of one head, (slots, D) each, oldest first."""
    n = int(cache.lengths[layer, b, g])
    if isinstance(cache, dmc_fast.PagedCache):
        pages = cache.table[layer, b, g].long()
        return [pool[pages].flatten(0, 1)[:n] for pool in (cache.pool_k, cache.pool_v)]
    return [slots[layer][b, g, :n] for slots in (cache.keys, cache.values)]


def assert_close(a, b, tolerance=1e-9):
    assert a.shape == b.shape and (a - b).abs().max().item() < tolerance


# ------------------------------------------------------ precision: no worse than the plain code

def with_gradients(f, inputs, dtype):
    """f's outputs and the gradients of all inputs, for a fixed random gradient of the outputs.

    The gradient of the outputs is exact in bf16. dtype: what the inputs are converted to; None:
    they stay as they are.
    """
    inputs = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    out = f(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    rng = torch.Generator().manual_seed(0)
    slopes = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(torch.bfloat16).to(x)
              for x in out]
    grads = torch.autograd.grad(out, inputs, slopes, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*out, *grads)]


def assert_as_good(fast, plain, exact, factor=4):
    """Each tensor of `fast` is nearly as exact as that of `plain`.

    Its error is at most `factor` times the plain one's error plus the dtype's rounding, so nobody
    tunes a tolerance.
    """
    for i, (a, b, c) in enumerate(zip(fast, plain, exact, strict=True)):
        assert a.shape == c.shape and a.dtype == b.dtype and a.isfinite().all(), i
        error, allowed = ((x.double() - c.double()).abs().max().item() for x in (a, b))
        rounding = torch.finfo(a.dtype).eps * max(1.0, c.abs().max().item())
        assert error <= factor * (allowed + rounding), (i, error, allowed, rounding)


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


# --------------------------------------------------------------------------------------- Eq. 8

@given(seeds, st.floats(-3, 8), st.sampled_from([0.1, 0.4, 1.0]))
def test_decision_is_eq8(seed, logit, tau):
    config, n = config_of(tau=tau, c=5.0), 20_000
    torch.manual_seed(seed)
    x = torch.full((1, 1, n + 1), logit)
    alpha, keep = dmc.relaxed_decision(x, config, noise=True)
    # sigmoid((logit - c + logistic noise) / tau) > 1/2 where the logistic sample exceeds c - logit
    p = 1 / (1 + math.exp(5.0 - logit))
    merged = (alpha[..., 1:] > 0.5).double().mean().item()
    assert abs(merged - p) < 5 * math.sqrt(p * (1 - p) / n)
    inside = alpha.double() < 0.99
    assert_close(torch.log1p(-alpha.double())[inside], keep.double()[inside], 1e-4)
    hard, hard_keep = dmc.relaxed_decision(x, config, noise=False)
    assert (hard[..., 1:] == float(logit > 5.0)).all()
    assert (hard_keep[..., 1:] == (-math.inf if logit > 5.0 else 0.0)).all()
    for first in (alpha, keep, hard, hard_keep):
        assert (first[..., 0] == 0).all()
    continued, _ = dmc.relaxed_decision(x, config, noise=False, start=False)
    assert (continued == float(logit > 5.0)).all()


@given(seeds, st.floats(0.01, 1), st.sampled_from([0.1, 0.5]))
def test_less_noise_is_eq8_of_larger_logits(seed, noise, tau):
    config = config_of(tau=tau, c=3.0)
    logit = torch.randn(2, 3, 50, generator=torch.manual_seed(seed), dtype=torch.float64) + 3
    torch.manual_seed(seed)
    alpha = dmc.relaxed_decision(logit, config, noise)[0]
    torch.manual_seed(seed)
    assert_close(alpha, dmc.relaxed_decision(3 + (logit - 3) / noise, config, noise=True)[0])


def test_decisions_with_hardly_any_noise_are_those_of_use():
    config, logit = config_of(c=3.0), 3 + torch.tensor([[[1e-2, -1e-2, 1.0, -1.0]]])
    for ours, hard in zip(dmc.relaxed_decision(logit, config, 1e-5),
                          dmc.relaxed_decision(logit, config, noise=False), strict=True):
        assert_close(ours.exp(), hard.exp())


def test_first_decision_has_no_gradient_and_the_others_the_analytic_one():
    logit = torch.tensor([[[9.0, 4.8, 5.3]]], requires_grad=True, dtype=torch.float64)
    config = config_of(c=5.0)
    torch.manual_seed(0)
    alpha, keep = dmc.relaxed_decision(logit, config, noise=True)
    slope = torch.autograd.grad(alpha.sum(), logit, retain_graph=True)[0]
    expected = (alpha * (1 - alpha) / config.tau).detach()
    assert slope[..., 0] == 0 and torch.allclose(slope, expected, rtol=1e-9)
    slope = torch.autograd.grad(keep.sum(), logit)[0]
    expected = (-alpha / config.tau).detach()
    assert slope[..., 0] == 0 and torch.allclose(slope[..., 1:], expected[..., 1:], rtol=1e-9)


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
    for token in parts((q, k, v, hard, omega), 1):
        assert cache.attend(0, *token).isfinite().all()


# --------------------------------------------------------------------------------------- Eq. 9

@both
@given(seeds, lengths, windows)
def test_accumulate_is_the_literal_recurrence(ops, seed, T, window):
    _, k, v, alpha, omega = qkv(seed, (3, 3), T)
    alpha = torch.rand_like(alpha)
    alpha[..., 0] = 0
    k_mean, v_mean = ops.accumulate(k, v, alpha, omega, window)
    for b, g in np.ndindex(2, 3):
        for x, mean in ((k, k_mean), (v, v_mean)):
            head = (y[b, g].numpy() for y in (x, alpha, omega))
            expected = torch.from_numpy(literal_accumulate(*head, window))
            assert_close(mean[b, g], expected, 1e-12)


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
    windowed, exact = (ops.accumulate(k, v, alpha, omega, w) for w in (window, None))
    for a, b in zip(windowed, exact, strict=True):
        assert_close(a, b, 1e-12)


@both
@given(seeds, lengths, windows, st.sampled_from([1e-20, 1e-3, 1e6]))
def test_scaling_all_importances_changes_nothing(ops, seed, T, window, factor):
    _, k, v, alpha, omega = qkv(seed, (2, 2), T)
    before, after = (ops.accumulate(k, v, alpha, x * omega, window) for x in (1, factor))
    for a, b in zip(before, after, strict=True):
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
    """bf16 in, bf16 out, at the cost of one rounding: half a unit in the last place."""
    _, k, v, alpha, omega = qkv(0, (2, 2), 40, merge=0.9)
    k, v, alpha, omega = k.bfloat16(), v.bfloat16(), alpha.float(), omega.float()
    exact = ops.accumulate(*(x.double() for x in (k, v, alpha, omega)), window)
    half = ops.accumulate(k, v, alpha, omega, window)
    for a, b in zip(half, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert ((a.double() - b).abs() <= b.abs() * 2 ** -8 * 1.01 + 1e-6).all()


# --------------------------------------------------------------------- appendix F, Eq. 10, 12

@given(seeds, lengths)
def test_mask_entries(seed, T):
    rng = torch.Generator().manual_seed(seed)
    keep = -torch.rand(1, 2, T, dtype=torch.float64, generator=rng)
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
            expected_slope = -float(kept[b] > 1 / cr) / (2 * 3 * 4 * 10)
            assert_close(slope[:, b], torch.full_like(slope[:, b], expected_slope))
    at_target = torch.tensor([0.0, 1.0]).repeat(3, 2, 4, 5)
    assert dmc.compression_loss(at_target, 2.0).item() == 0
    assert dmc.compression_loss(at_target, 1.9).item() == 0
    assert dmc.compression_loss(at_target, 2.1).item() > 0
    uneven = torch.stack([torch.ones(3, 4, 10), torch.zeros(3, 4, 10)], dim=1)
    assert dmc.compression_loss(uneven, 2.0).item() == 0.25     # each sequence is held to 1 / CR


def test_channel_gain_is_eq12():
    assert [dmc.channel_gain(s, 4) for s in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]


@both
@given(seeds, groups, windows)
def test_control_channels_act_only_through_alpha_and_omega(ops, seed, heads, window):
    config = config_of(heads, window)
    q, k, v, alpha, omega = qkv(seed, heads, 11)
    caches = [ops.Cache(config, 2, dtype=torch.float64) for _ in range(2)]
    y = parallel_form(ops, q, k, v, alpha, omega, config)
    z = caches[0].attend(0, q, k, v, alpha, omega)
    q[..., 0], k[..., 0] = 1e3, -1e3
    assert_close(parallel_form(ops, q, k, v, alpha, omega, config), y)
    assert_close(caches[1].attend(0, q, k, v, alpha, omega), z)


@both
@given(seeds, groups)
def test_faded_channels_are_invisible_and_full_ones_are_not(ops, seed, heads):
    model = model_of(seed, heads, ops=ops)
    tokens = torch.randint(0, 29, (2, 9))
    faded, full = model(tokens, gain=0.0)[0], model(tokens, gain=1.0)[0]
    with torch.no_grad():
        for rows in control_rows(model):
            rows.normal_()
    assert_close(model(tokens, gain=0.0)[0], faded)
    assert (model(tokens, gain=1.0)[0] - full).abs().max() > 1e-6
    with torch.no_grad():
        for rows in control_rows(model):
            rows.zero_()
    assert_close(model(tokens, gain=1e-9)[0], faded, 1e-6)      # Eq. 12 has no jump at its end


# --------------------------------------------------------------------------------- Algorithm 1

@both
@given(seeds, groups, lengths, windows)
def test_cache_and_parallel_form_are_algorithm1(ops, seed, heads, T, window):
    config = config_of(heads, window)
    inputs = qkv(seed, heads, T)
    q, k, v, alpha, omega = inputs
    cache = ops.Cache(config, 2, dtype=torch.float64)
    stepwise = torch.cat([cache.attend(1, *token) for token in parts(inputs, 1)], dim=2)
    parallel = parallel_form(ops, *inputs, config)
    H, G = heads
    for b, g in np.ndindex(2, G):
        group = slice(g * H // G, (g + 1) * H // G)
        head = (x.numpy() for x in (q[b, group], k[b, g], v[b, g], alpha[b, g], omega[b, g]))
        y, slots = literal_algorithm1(*head, window, config.rope_theta)
        assert_close(stepwise[b, group], torch.from_numpy(y))
        assert_close(parallel[b, group], torch.from_numpy(y))
        assert cache.lengths[1, b, g] == slots == (1 - alpha[b, g]).sum()
    assert (cache.lengths[0] == 0).all()


@both
@given(seeds, groups, lengths, windows, st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_any_split_into_portions_equals_one_by_one(ops, seed, heads, T, window, portions):
    config = config_of(heads, window)
    inputs = qkv(seed, heads, T)
    starts = np.minimum(np.cumsum([0, *(min(n, T) for n in portions), T]), T)
    caches, outputs = [], []
    for sizes in ([1] * T, [int(n) for n in np.diff(starts) if n]):
        caches.append(ops.Cache(config, 2, dtype=torch.float64))
        outputs.append(torch.cat([caches[-1].attend(0, *x) for x in parts(inputs, sizes)], dim=2))
    one_by_one, split = caches
    assert_close(*outputs)
    assert (one_by_one.lengths == split.lengths).all()
    for b, g in np.ndindex(2, heads[1]):
        slots = (slots_of(cache, 0, b, g) for cache in caches)
        for mine, theirs in zip(*slots, strict=True):
            assert_close(mine, theirs)


@both
@given(seeds, groups, lengths, windows)
def test_all_merges_leave_one_slot(ops, seed, heads, T, window):
    config = config_of(heads, window)
    q, k, v, _, omega = qkv(seed, heads, T)
    ones = torch.ones_like(omega)
    for split in (1, T):
        cache = ops.Cache(config, 2, dtype=torch.float64)
        for part in parts((q, k, v, ones, omega), split):
            y = cache.attend(0, *part)
        assert (cache.lengths[0] == 1).all()
        expected = ops.accumulate(k, v, ones, omega, window)[1][:, :, -1]
        assert_close(y[:, :, -1], expected.repeat_interleave(heads[0] // heads[1], dim=1))


@both
@given(seeds, lengths)
def test_compression_ratio_is_tokens_per_slot(ops, seed, T):
    q, k, v, alpha, omega = (x.float() for x in qkv(seed, (8, 2), T))
    cache = ops.Cache(config_of((8, 2), n_layer=1), 2)
    assert cache.compression_ratio == 1.0
    cache.attend(0, q, k, v, alpha, omega)
    assert cache.compression_ratio == pytest.approx(alpha.numel() / (1 - alpha).sum().item())


# ----------------------------------------------------------------------------- the whole model

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
    """With alpha in {0, 1} the training form equals the cache, at every position of the model."""
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
    L, G, rng = model.config.n_layer, heads[1], torch.Generator().manual_seed(seed)
    script = (torch.rand(L, 2, G, T, generator=rng) < merge).double()
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
@given(seeds, groups, lengths, st.integers(1, 8))
def test_logits_are_the_head_of_the_hidden_states(ops, seed, heads, T, split):
    model = model_of(seed, heads, ops=ops)
    tokens = torch.randint(0, 29, (2, T))
    for how in ({}, dict(noise=True), dict(gain=0.5)):
        torch.manual_seed(seed)                                  # the same noise for both
        x, alpha = model.hidden(tokens, **how)
        torch.manual_seed(seed)
        logits, same_alpha = model(tokens, **how)
        assert x.shape == (2, T, model.config.dim) and torch.equal(logits, model.lm_head(x))
        assert (alpha is None) == (same_alpha is None) == ("gain" in how)
        assert alpha is None or torch.equal(alpha, same_alpha)
    cache = model.Cache(model.config, 2, dtype=torch.float64)
    x = torch.cat([model.hidden(part, cache)[0] for part in tokens.split(split, dim=1)], dim=1)
    assert_close(model.lm_head(x), through_cache(model, tokens, split)[0])


@both
def test_every_parameter_learns_from_both_losses(ops):
    model = model_of(0, (8, 2), c=0.0, tau=1.0, ops=ops)
    tokens = torch.randint(0, 29, (2, 12))
    logits, alpha = model(tokens, noise=True)
    lm_loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    (lm_loss + dmc.compression_loss(alpha, 8)).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
    for layer in model.layers:
        for p in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
            assert p.grad[::8].abs().sum() > 0


@both
def test_misuse_is_refused(ops):
    model = model_of(0, ops=ops)
    with pytest.raises(ValueError, match="more tokens than the model's 64 positions"):
        model(torch.zeros(1, 65, dtype=torch.long))
    cache = ops.Cache(model.config, 1, dtype=torch.float64)
    model(torch.zeros(1, 60, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="64 positions"):
        model(torch.zeros(1, 5, dtype=torch.long), cache)
    for bad in (dict(noise=True), dict(gain=1.0), dict(gain=0.5)):
        with pytest.raises(ValueError, match="a cache takes no noise, and no gain but its own"):
            model(torch.zeros(1, 1, dtype=torch.long), cache, **bad)


@on_cpu
@pytest.mark.parametrize("window", [None, 3])
def test_model_with_fast_ops(window):
    """Logits, decisions, every parameter's gradient, and what the cache gives."""
    torch.manual_seed(0)
    plain = Transformer(config_of((8, 2), window, c=0.0)).double()
    fast = Transformer(plain.config, ops=dmc_fast).double()
    fast.load_state_dict(plain.state_dict())
    tokens = torch.randint(0, 29, (2, 21))
    results = []
    for model in (plain, fast):
        torch.manual_seed(1)
        logits, alpha = model(tokens, noise=True)
        (logits.square().mean() + dmc.compression_loss(alpha, 4)).backward()
        with torch.no_grad():
            cached, cache = through_cache(model, tokens, [15, 1, 5])
        grads = [p.grad for p in model.parameters()]
        results.append([logits, alpha, cached, cache.lengths, *grads])
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(*results, strict=True))


def test_worked_example():
    """It says that the parallel form and the cache agree, and fits a terminal."""
    done = subprocess.run([sys.executable, HERE / "dmc.py"], capture_output=True, text=True,
                          check=True, timeout=60)
    assert "compression ratio" in done.stdout
    assert float(done.stdout.split()[-1].rstrip(".")) < 1e-6
    assert max(map(len, done.stdout.splitlines())) <= 80


# ----------------------------------------------- the paged cache, in operations and in kernels

def open_segment(cache, layer):
    """The importances, keys and values that a cache remembers of the open segments, in order.

    Those of earlier segments, whose importance is 0, as zeros: that is how some caches keep them.
    """
    if isinstance(cache, dmc.Cache):
        omegas, keys, values = cache.segment[layer]
    else:
        keys, values, omegas = (x[layer] for x in cache.open.tensors())
        W, seen = omegas.size(-1), cache.seen[layer]
        order = torch.arange(max(0, seen - W), seen, device=keys.device) % W   # of a ring
        omegas, keys, values = (x.index_select(2, order) for x in (omegas, keys, values))
    unused = (omegas == 0)[..., None]
    return omegas, *(x.masked_fill(unused, 0) for x in (keys, values))


def check_cache(heads, window, T, portions, D=8, page_size=16, decides=True, batch=1, merge=0.5,
                dtype=torch.float32, device="cpu"):
    """The same tokens, in portions, into both caches: outputs, lengths, open segment, slots."""
    config = config_of(heads, window, head_dim=D, dmc=decides, n_layer=2, max_seq_len=max(64, T))
    *inputs, alpha, omega = (x.to(device) for x in qkv(5, heads, T, batch, D, merge))
    inputs = [*(x.to(dtype) for x in inputs), alpha.float(), omega.float()]
    plain, exact = (dmc.Cache(config, batch, device, dtype=x) for x in (dtype, torch.float64))
    fast = dmc_fast.PagedCache(config, batch, device, dtype, page_size)
    shuffled = torch.randperm(len(fast.free), generator=torch.Generator().manual_seed(0))
    fast.free = fast.free[shuffled.to(device)]
    outputs = []
    for cache in (fast, plain, exact):
        mine = [x.double() if cache is exact else x for x in inputs][:None if decides else 3]
        outputs.append([cache.attend(1, *part) for part in parts(mine, portions)])
    assert_as_good(*outputs)
    assert (plain.lengths == fast.lengths).all() and plain.seen == fast.seen
    slots = plain.lengths.sum().item()
    assert fast.bytes.used == slots * 2 * D * fast.pool_k.element_size()
    assert fast.compression_ratio == pytest.approx(alpha.numel() / slots)
    if decides:
        assert_as_good(*(open_segment(cache, 1) for cache in (fast, plain, exact)))
    return plain, fast


@pytest.mark.parametrize("heads,window,portions,D,decides,merge", [
    ((3, 1), 3, [1] * 19, 8, True, 0.8), ((4, 1), None, [1] * 4, 64, True, 0.5),
    ((8, 1), 12, [17, 1, 1], 8, True, 0.1), ((2, 2), None, [16, 1, 2], 8, True, 0.0),
    ((2, 1), 2, [6, 1, 1, 1, 1], 8, True, 0.9), ((1, 1), 1, [15, 1, 1], 128, True, 0.5),
    ((2, 2), 12, [15, 1, 1], 8, False, 0.0)])
def test_paged_cache_kernel(poisoned, heads, window, portions, D, decides, merge):
    plain, fast = check_cache(heads, window, sum(portions), portions, D, 16, decides, merge=merge)
    assert fast.kernels == INTERPRETED
    fast.check()
    for g in range(heads[1]):
        slots = (slots_of(cache, 1, 0, g) for cache in (fast, plain))
        for mine, theirs in zip(*slots, strict=True):
            assert (mine - theirs).abs().max() < 1e-5


def owned_pages(cache):
    owned = -(-cache.lengths // cache.page_size)
    return cache.table[torch.arange(cache.table.size(-1)) < owned[..., None]].tolist()


def all_pages(cache):
    """The numbers of all pages, owned or free, in order; the spare one is not counted."""
    owned = [page for page in owned_pages(cache) if page > 0]
    return sorted(owned + cache.free[:max(0, cache.left.item())].tolist())


def test_pages_run_out_and_come_back_kernel(poisoned):
    """No page is owned twice or lost. An exhausted pool is reported, and nobody's slots change;
    released pages serve anew."""
    inputs = [x.float() for x in qkv(0, (2, 2), 40, merge=0.0)]
    cache = dmc_fast.PagedCache(config_of((2, 2), 3, n_layer=1), 2, pages=7)
    conserved = lambda: all_pages(cache) == list(range(1, 8))
    tokens = lambda first, end, rows=2: [x[:rows, :, first:end] for x in inputs]

    cache.attend(0, *tokens(0, 16))
    assert cache.left.item() == 3 and conserved()
    before = cache.pool_k.clone()
    owned = owned_pages(cache)
    cache.attend(0, *tokens(16, 17))
    assert (before[owned] == cache.pool_k[owned]).all() and conserved()
    with pytest.raises(ValueError, match="7 pages are used up"):
        cache.check()
    cache.check()                                                # reported once
    cache.release([0])
    assert conserved() and (cache.lengths[:, 0] == 0).all()
    part = cache.admit(slice(0, 1))
    y = [part.attend(0, *tokens(0, 9, 1)), part.attend(0, *tokens(9, 10, 1))]
    expected = dmc.Cache(cache.config, 1).attend(0, *tokens(0, 10, 1))
    assert (torch.cat(y, 2) - expected).abs().max() < 1e-5 and conserved()
    part.check()
    cache.release([1])
    cache.attend(0, *tokens(10, 11))                             # the released one does nothing
    assert cache.lengths[0, :, 0].tolist() == [11, 0] and conserved()
    cache.release([0])
    assert cache.left.item() == 7 and conserved()


def test_a_prompt_too_long_for_the_pool_kernel(poisoned):
    inputs = [x.float() for x in qkv(0, (2, 2), 40, merge=0.0)]
    cache = dmc_fast.PagedCache(config_of((2, 2), 3, n_layer=1), 2, pages=5)
    cache.attend(0, *inputs)
    with pytest.raises(ValueError, match="used up"):
        cache.check()
    pages = [p for p in owned_pages(cache) if p > 0]
    assert sorted(pages) == list(range(1, 6))                    # all taken, none twice
    cache.release([0, 1])
    assert sorted(cache.free[:cache.left.item()].tolist()) == list(range(1, 6))


def test_an_admitted_sequence_knows_nothing_of_the_one_before_it_kernel():
    """A prompt shorter than the window, merged into from the first step, where a longer segment
    was open."""
    config = config_of((1, 1), 12, n_layer=1)
    before, after = ([x.float()[:1] for x in qkv(seed, (1, 1), 20, merge=1.0)] for seed in (0, 1))
    cache = dmc_fast.PagedCache(config, 1, pages=3)
    cache.attend(0, *before)
    cache.release(slice(0, 1))
    part, reference = cache.admit(slice(0, 1)), dmc.Cache(config, 1)
    for portion in parts([x[:, :, :6] for x in after], [2, 1, 1, 1, 1]):
        y, expected = (c.attend(0, *portion) for c in (part, reference))
        assert (y - expected).abs().max() < 1e-5


@settings(max_examples=12 if INTERPRETED else 60)
@given(st.data())
def test_sequences_come_and_go_kernel(data):
    """Prefill, decode, finish, admit, exhaust, in any order, against one reference each; no page
    is lost or doubled."""
    config = config_of((1, 1), data.draw(st.sampled_from([None, 3])), n_layer=1)
    cache, references, at = dmc_fast.PagedCache(config, 2, pages=3), {}, 0
    tokens = [x.float() for x in qkv(data.draw(seeds), (1, 1), 300, merge=0.1)]
    cache.release([0, 1])
    for _ in range(data.draw(st.integers(3, 8))):
        row = data.draw(st.sampled_from([0, 1]))
        if row not in references:
            n = data.draw(st.sampled_from([2, 16, 17, 33]))
            part = [x[:1, :, at:at + n].clone() for x in tokens]
            part[3][..., 0] = 0
            references[row] = dmc.Cache(config, 1)
            admitted = cache.admit(slice(row, row + 1))
            y, z = (c.attend(0, *part) for c in (admitted, references[row]))
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
            assert cache.lengths[0, i] == reference.lengths[0, 0]
            assert cache.ages[0, i, 0] == reference.seen[0]
        assert all_pages(cache) == [1, 2, 3]
        with contextlib.suppress(ValueError):
            cache.check()
            continue
        cache.release([0, 1])                                    # an exhausted pool ends the batch
        references.clear()
    cache.release([0, 1])
    assert sorted(cache.free.tolist()) == [1, 2, 3] and cache.left.item() == 3


# ----------------------------------------------------------------- kernels in the interpreter

@pytest.fixture(scope="session", autouse=True)
def interpreter(request):
    """The process of `test_kernels_in_the_interpreter`, which runs beside all other tests.

    It is started first and waited for last, whichever of test_dmc.py and tests/ were asked for.
    """
    wanted = any(item.name == "test_kernels_in_the_interpreter" for item in request.session.items)
    process = None
    if wanted and triton and not INTERPRETED:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                   "-k", "kernel", "test_dmc.py", "tests"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=HERE, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    yield process
    if process and process.poll() is None:
        process.kill()


@needs_triton
@on_cpu
def test_kernels_in_the_interpreter(interpreter):
    printed, _ = interpreter.communicate()
    assert interpreter.returncode == 0 and " passed" in printed, printed[-4000:]
