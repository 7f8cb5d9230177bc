"""Properties of nanodmc/first_decisions.py: costs against their literal meaning, and a run."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import dmc
import train
from conftest import (
    SHORT,
    TINY,
    ctrl_c,
    curve,
    interrupted,
    refusal,
    same_weights,
    two_processes,
)
from nanodmc import first_decisions
from nanodmc.first_decisions import LEAST, apply, fit, measure, predictor
from nanodmc.optim import recompute_layers
from nanodmc.phases import FIRST_CR, plan
from nanodmc.settings import Settings
from test_dmc import assert_close, both, groups, model_of, seeds

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(B=1, T=12, seed=0):
    return torch.randint(29, (B, T), generator=torch.Generator().manual_seed(seed))


def literal(model, x):
    """cost and weight (L, T, G) of every token, each query without it anew."""
    config, T = model.config, x.size(1)
    hidden, outputs, inner = model.embed_tokens(x), [], []
    cos, sin = dmc.rotary_table(config, T)
    for block in model.layers:
        a, h = block.self_attn, block.input_layernorm(hidden)
        q, k, v = (proj(h).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
                   for proj in (a.q_proj, a.k_proj, a.v_proj))
        q, k = (dmc.rotate_heads(z, cos, sin, 0.0) for z in (q, k))
        group = config.n_head // config.n_kv_head
        k, v = (z.repeat_interleave(group, dim=1) for z in (k, v))
        scores = (q @ k.mT / math.sqrt(config.head_dim))[0]                    # (H, T, T)
        scores = scores + torch.full((T, T), -torch.inf).triu(1)
        y = (scores.softmax(-1) @ v[0])                                        # (H, T, D)
        outputs.append(y)
        inner.append((scores.detach(), v[0].detach()))
        hidden = hidden + a.o_proj(y.transpose(0, 1).flatten(1)[None])
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    logits = model.lm_head(model.norm(hidden))[0]
    loss = F.cross_entropy(logits[:-1], x[0, 1:], reduction="sum")
    gradients = torch.autograd.grad(loss, outputs)
    cost, weight = torch.zeros(2, len(inner), T, config.n_head, dtype=torch.float64)
    for n, ((scores, v), y, g) in enumerate(zip(inner, outputs, gradients, strict=True)):
        for t in range(T):
            weight[n, t] = scores.softmax(-1)[:, :, t].square().sum(-1)
            for i in range(max(t, 1), T):       # query 0 has nothing but token 0
                left = torch.arange(T) != t
                without = scores[:, i, left].softmax(-1)[:, None] @ v[:, left]
                change = without[:, 0] - y[:, i].detach()
                rest = 1 - scores.softmax(-1)[:, i, t]
                change = change * (rest / rest.clamp(min=LEAST))[:, None]
                cost[n, t] += (g[:, i] * change).sum(-1).square() / 2
    return (z.unflatten(-1, (config.n_kv_head, -1)).sum(-1) for z in (cost, weight))


@both
@given(seeds, groups)
def test_a_cost_is_what_each_query_loses_without_the_token(ops, seed, heads):
    model, x = model_of(seed, heads, ops=ops), tokens(T=9, seed=seed)
    cost, weight = literal(model, x)
    seen = measure(model, x)
    for layer, some, ours in zip(model.layers, seen, zip(cost, weight, strict=True), strict=True):
        assert_close(some.weight, ours[1])
        assert_close(some.cost[1:], ours[0][1:])             # token 0 always appends
        assert not layer.self_attn.q_proj._forward_hooks
        assert not layer.self_attn.o_proj._forward_pre_hooks
    h = model.layers[0].input_layernorm(model.embed_tokens(x))
    assert_close(seen[0].x, h[0])
    assert all(p.grad is None for p in model.parameters())


def test_costs_are_the_same_where_layers_are_computed_again():
    model, again = model_of(1, (4, 2)), model_of(1, (4, 2))
    recompute_layers(again)
    for ours, theirs in zip(measure(again, tokens()), measure(model, tokens()), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@given(seeds, st.integers(-4, 4).map(lambda n: n / 4))
def test_a_predictor_finds_the_mean_of_the_target(seed, offset):
    """Which is exp(x w), but each single target is far from it."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.ones(8192, 1), torch.randn(8192, 3, generator=draw)], dim=1)
    x = x * torch.tensor([1.0, 10.0, 0.1, 1.0])              # of any scale
    w = torch.tensor([[0.3, 0.05, 4.0, 0.0], [-0.5, 0.0, 0.0, 0.7]])
    noise = -torch.rand(8192, 2, generator=draw).clamp(1e-6).log()     # of mean 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_decisions, "DECAY", 0.0)         # which pulls towards the offset
        found = x @ predictor(x, (x @ w.T).exp() * noise, offset).T + offset
    assert (found - x @ w.T).square().mean().sqrt() < 0.1


def test_decisions_merge_what_is_cheap():
    """In a model whose tokens differ in it: on other text, merged tokens cost less than others."""
    model = model_of(3, (4, 2)).float()
    rows = fit(model, list(tokens(96, 32, seed=1).split(1)))
    other = dmc.Transformer(model.config)
    other.load_state_dict(model.state_dict())
    apply(rows, other)
    D = model.config.head_dim
    for name, weight in model.state_dict().items():
        changed = (weight != other.state_dict()[name])
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            changed = changed.unflatten(0, (-1, D))[:, 1:]
        assert not changed.any(), name
    x = tokens(16, 32, seed=2)
    with torch.no_grad():
        alpha = other(x)[1][..., 1:].bool()                                # (L, B, G, T - 1)
    cost = torch.stack([torch.stack([seen.cost[1:].T for seen in measure(model, part)])
                        for part in x.split(1)], dim=1)
    assert 1 / (1 - alpha.float().mean()) > 1.05
    assert cost[alpha].mean() < 0.6 * cost[~alpha].mean()
    for layer in other.layers:                               # one weight for a group of queries
        queries = layer.self_attn.q_proj.weight[::D].unflatten(0, (2, 2))
        assert torch.equal(queries[:, 0], queries[:, 1])


# ------------------------------------------------------------------------------------------ a run

FITTING = ["--fit-decisions", *SHORT]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(first_decisions, "TOKENS", 512)


def test_the_target_starts_where_the_decisions_do():
    phases = {p.name: p for p in plan(Settings(fit_decisions=True, retrofit_steps=110, cr=4.0))}
    retrofit = phases["retrofit"]
    assert retrofit.fits and retrofit.cr == (FIRST_CR, 4.0)
    for step, folder in retrofit.keep.items():
        assert folder == f"retrofit-{retrofit.target(step - 1):.0f}"


def test_a_run_that_fits_goes_on_with_its_decisions(tmp_path, text, monkeypatch, capsys, few):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main(["--out", str(whole), "--data", text, *TINY, *FITTING]) == 0
    assert "fitted to what merging costs on 512 tokens" in capsys.readouterr().out
    first = [row["cr"] for row in curve(whole) if row["phase"] == "retrofit"][0]
    assert first > 1.02
    assert interrupted(cut, text, arguments=FITTING, at=9) == 130     # in the middle of retrofit
    monkeypatch.setattr(first_decisions, "fit", None)                 # nothing is fitted again
    assert train.main(["--resume", "--out", str(cut)]) == 0
    assert curve(cut) == curve(whole) and same_weights(cut, whole)


def test_a_stop_while_costs_are_measured_loses_nothing(tmp_path, text, monkeypatch, few):
    out, whole = tmp_path / "cut", tmp_path / "whole"
    assert train.main(["--out", str(whole), "--data", text, *TINY, *FITTING]) == 0
    measure = first_decisions.measure

    def stopped(*arguments):
        ctrl_c()
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(first_decisions, "measure", stopped)
        assert train.main(["--out", str(out), "--data", text, *TINY, *FITTING]) == 130
    assert json.loads((out / "state.json").read_text())["step"] == 0
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert curve(out) == curve(whole) and same_weights(out, whole)


@pytest.mark.parametrize("flags", [["--variant", "dmc-hardc"], ["--cr", "1.2"], ["--keep", "1.1"]])
def test_what_cannot_start_with_fitted_decisions_is_refused(tmp_path, text, capsys, flags):
    said = refusal(train.main, ["--out", str(tmp_path / "run"), "--data", text, "--fit-decisions",
                                *flags], capsys, tmp_path)
    assert "1.25" in said


ONE_OF_TWO = """
import sys, torch, train
from nanodmc import first_decisions
torch.set_num_threads(1)
first_decisions.TOKENS = 512
apply = first_decisions.apply
def kept(rows, model):
    torch.save(rows, f"{sys.argv[1]}-{train.this_rank()}")
    apply(rows, model)
first_decisions.apply = kept
sys.exit(train.main(sys.argv[2:]))
"""


def test_two_processes_fit_as_one_does(tmp_path, text, monkeypatch, few):
    """Each holds a part of every weight, and both read all of the sequences."""
    script, rows = tmp_path / "script.py", []
    arguments = ["--data", text, *TINY, *FITTING, "--pretrain-steps", "1", "--free-steps", "1",
                 "--retrofit-steps", "1", "--micro-batch", "1"]
    monkeypatch.setattr(first_decisions, "apply", lambda fitted, model: rows.append(fitted))
    assert train.main(["--out", str(tmp_path / "one"), *arguments]) == 0
    script.write_text(ONE_OF_TWO)
    done = two_processes(script, tmp_path / "rows", "--out", tmp_path / "two", *arguments)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        for ours, theirs in zip(torch.load(f"{tmp_path / 'rows'}-{rank}"), rows[0], strict=True):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
