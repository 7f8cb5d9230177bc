"""Properties of nanodmc/variants.py: each variant against what the paper says of it, literally."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmc
import dmc_fast
import generate
import train
from conftest import TINY, before_step, ctrl_c, curve, refusal, summary
from nanodmc import checkpoint
from nanodmc.config import config_from_json, config_to_json
from nanodmc.files import InputError
from nanodmc.parallel import part_of
from nanodmc.phases import plan
from nanodmc.settings import Settings
from nanodmc.variants import (
    VARIANTS,
    VariantConfig,
    compression_term,
    group_heads,
    of_model,
    ops_of,
)
from test_dmc import (
    assert_close,
    both,
    config_of,
    groups,
    lengths,
    model_of,
    qkv,
    seeds,
    through_cache,
    windows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DECIDING = [name for name in VARIANTS if name != "gqa"]


def variant_of(name, seed, heads=(4, 4), window=12, ops=dmc, every=None):
    """A model of a variant in fp64 whose decisions vary, as test_dmc.model_of makes one of DMC."""
    config = VariantConfig(**vars(config_of(heads, window)), variant=name,
                           every=every if name == "fmp" else None)
    model = dmc.Transformer(config, ops_of(config, ops)).double()
    model.load_state_dict(model_of(seed, heads, window).state_dict())
    return model


@both
@pytest.mark.parametrize("name", DECIDING)
@given(seeds, groups, lengths, windows, st.integers(1, 8), st.integers(2, 5))
@settings(max_examples=12)
def test_training_form_and_cache_agree(ops, name, seed, heads, T, window, split, every):
    model = variant_of(name, seed, heads, window, ops, every)
    tokens = torch.randint(0, 29, (2, T))
    logits, alpha = model(tokens)
    for portions in (1, split):
        cached, cache = through_cache(model, tokens, portions)
        assert_close(cached, logits)
        assert (cache.lengths == (1 - alpha).sum(-1)).all()


@given(seeds, groups, lengths, st.booleans())
def test_hardc_decides_as_head_0_does_for_all(seed, heads, T, noise):
    config, (q, k, *_) = config_of(heads), qkv(seed, heads, T)
    decide = VARIANTS["dmc-hardc"].decide
    torch.manual_seed(seed)
    alpha, keep, omega = decide(q, k, config, noise)
    torch.manual_seed(seed)
    expected, expected_keep = dmc.relaxed_decision(k[:, :1, :, 0], config, noise)
    for head in range(heads[1]):
        assert torch.equal(alpha[:, head], expected[:, 0])
        assert torch.equal(keep[:, head], expected_keep[:, 0])
        of_group = q[:, :heads[0] // heads[1], :, 0].mean(1)
        assert_close(omega[:, head], torch.sigmoid(of_group))


@given(seeds, groups, lengths, st.booleans(), st.integers(0, 9))
def test_uniform_weights_change_nothing_but_the_weights(seed, heads, T, noise, position):
    config, (q, k, *_) = config_of(heads), qkv(seed, heads, T)
    decided = []
    for decide in (dmc.decide, VARIANTS["uniform"].decide):
        torch.manual_seed(seed)
        decided.append(decide(q, k, config, noise, position))
    (alpha, keep, _), (same_alpha, same_keep, omega) = decided
    assert torch.equal(alpha, same_alpha) and torch.equal(keep, same_keep) and (omega == 1).all()


@given(seeds, groups, lengths, windows, st.integers(2, 5))
def test_fixed_pooling_averages_aligned_blocks(seed, heads, T, window, every):
    """The values of a block's last token are the plain mean of the block, as far as w reaches."""
    config = VariantConfig(**vars(config_of(heads, window)), variant="fmp", every=every)
    q, k, v, *_ = qkv(seed, heads, T)
    alpha, keep, omega = VARIANTS["fmp"].decide(q, k, config, noise=True)
    assert alpha.tolist() == [[[float(t % every > 0) for t in range(T)]] * heads[1]] * 2
    _, pooled = dmc.accumulate(k, v, alpha, omega, window)
    for t in range(T):
        first = max(t - t % every, t - (window or T) + 1)
        assert_close(pooled[:, :, t], v[:, :, first:t + 1].mean(2))


def test_fixed_pooling_does_not_look_at_keys():
    """So keys that are no numbers change nothing in the decisions."""
    config = VariantConfig(**vars(config_of()), variant="fmp", every=3)
    q, k, *_ = qkv(0, (4, 4), 7)
    expected = VARIANTS["fmp"].decide(q, k, config)
    for found, same in zip(VARIANTS["fmp"].decide(q * torch.nan, k * torch.inf, config), expected,
                           strict=True):
        assert torch.equal(found, same)


def literal_prior(alpha, cr, layers):
    """Eq. 10 of some layers of one sequence, summed item by item."""
    kept = [1 - a for layer in layers for head in alpha[layer] for a in head]
    return max(0.0, sum(kept) - len(kept) / cr) / len(kept)


@given(seeds, groups, lengths, st.floats(1, 8), st.floats(0, 3, allow_subnormal=False))
def test_losses_are_what_the_paper_names(seed, heads, T, cr, weight):
    rng = torch.Generator().manual_seed(seed)
    alpha = torch.rand(3, 2, heads[1], T, generator=rng, dtype=torch.float64)
    sequences = [alpha[:, b].tolist() for b in range(2)]
    together = sum(literal_prior(a, cr, range(3)) for a in sequences) / 2
    apart = sum(literal_prior(a, cr, [layer]) for a in sequences for layer in range(3)) / 6
    uneven = 0
    for a in sequences:
        for layer in a:
            means = [sum(head) / T for head in layer]
            uneven += sum(abs(m - sum(means) / len(means)) for m in means) / len(means) / 6
    expected = {"dmc": weight * together, "immediate": weight * together,
                "uniform": weight * together, "dmc-hardc": weight * together,
                "local-prior": weight * apart, "dmc-c": weight * together + uneven, "fmp": 0.0}
    for name, value in expected.items():
        loss = compression_term(VARIANTS[name], alpha, cr, weight, exact=False)
        assert abs(loss.item() - value) < 1e-9, name


def test_exact_losses_pull_from_both_sides():
    """In solidify: too few slots cost as much as too many; the local prior sees each layer."""
    alpha = torch.tensor([0.9, 0.6]).view(2, 1, 1, 1).expand(2, 1, 1, 8)     # 0.1 and 0.4 slots
    for name, value in (("dmc", 0.0), ("local-prior", 0.15)):
        loss = compression_term(VARIANTS[name], alpha, 4.0, 1.0, exact=True)
        assert loss.item() == pytest.approx(value, abs=1e-6)
    for cr in (2.0, 8.0):
        loss = compression_term(VARIANTS["dmc"], alpha, cr, 1.0, exact=True)
        assert loss.item() == pytest.approx(abs(0.25 - 1 / cr), abs=1e-6)


@both
@pytest.mark.parametrize("name", DECIDING)
def test_every_parameter_learns(ops, name):
    """Of fixed pooling, all but the control channels', which nothing reads."""
    model = variant_of(name, 0, (8, 2), ops=ops, every=3)
    tokens = torch.randint(0, 29, (2, 12))
    logits, alpha = model(tokens, noise=True)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    (loss + compression_term(VARIANTS[name], alpha, 8, 1, exact=False)).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


@both
@given(seeds, st.sampled_from([((4, 4), 2), ((4, 4), 1), ((8, 4), 2), ((6, 2), 1), ((4, 4), 4)]),
       lengths)
def test_grouped_heads_are_the_mean_of_adjacent_ones(ops, seed, sizes, T):
    """As a multi-head model in which every head of a group has the group's mean projection."""
    (heads, fewer) = sizes
    model = model_of(seed, heads, ops=ops, dmc=False)
    tokens = torch.randint(0, 29, (2, T))
    grouped = group_heads(model, heads[1] // fewer, ops)
    assert grouped.config.n_kv_head == fewer
    D, size = model.config.head_dim, heads[1] // fewer
    with torch.no_grad():
        for layer in model.layers:
            for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                for group in range(fewer):
                    rows = [slice((group * size + i) * D, (group * size + i + 1) * D)
                            for i in range(size)]
                    mean = sum(proj.weight[r] for r in rows) / size
                    for r in rows:
                        proj.weight[r] = mean
    assert_close(grouped(tokens)[0], model(tokens)[0])
    assert_close(through_cache(grouped, tokens, 3)[0], model(tokens)[0])


@pytest.mark.parametrize("size", [3, 8])
def test_heads_that_do_not_divide_are_refused(size):
    with pytest.raises(InputError, match=f"4 key-value heads cannot be averaged {size} by {size}"):
        group_heads(model_of(0, dmc=False), size)


def test_a_plain_dmc_model_needs_no_other_functions():
    assert ops_of(config_of(), dmc_fast) is dmc_fast
    config = VariantConfig(**vars(config_of()), variant="dmc-c")
    assert ops_of(config, dmc) is dmc


# ------------------------------------------------------------------------------ through train.py

def arguments(name, text):
    """A tiny run of a variant, at CR 2."""
    return ["--data", text, *TINY, "--heads", "4", "--kv-heads", "4", "--dim", "16",
            "--pretrain-steps", "2", "--cr", "2", "--keep", "2", "--variant", name,
            "--distill", "0.25"]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "dmc"])
def test_each_trains_saves_loads_and_generates(name, tmp_path, text, capsys):
    assert train.main(["--out", str(tmp_path / "run"), *arguments(name, text)]) == 0
    said = capsys.readouterr().out
    assert f"{VARIANTS[name].title} 2x" in said
    model = checkpoint.load(tmp_path / "run/cr2", dmc_fast, dtype=torch.float64)
    config = model.config
    if name == "gqa":
        assert type(config) is dmc.Config and not config.dmc and config.n_kv_head == 2
        assert json.loads((tmp_path / "run/cr2/figures.json").read_text())["cr"] == 2.0
    else:
        assert config.variant == name and config.every == (2 if name == "fmp" else None)
        assert of_model(config) is VARIANTS[name]
    tokens = torch.randint(0, 257, (2, 16))
    with torch.no_grad():
        logits, _ = model(tokens)
        cached, _ = through_cache(model, tokens, 5)
    assert_close(cached, logits)
    own = VARIANTS[name].decide if VARIANTS[name].decide is not dmc.decide else dmc_fast.decide
    assert model.layers[0].self_attn.decide is own or name == "gqa"
    entries = curve(tmp_path / "run")
    taught = {e["phase"] for e in entries if "kl" in e}
    assert taught == {e["phase"] for e in entries} - {"pretrain", "control"}
    checkpoint.save(model, tmp_path / "again")
    assert checkpoint.load(tmp_path / "again").config == config
    command = ["--ckpt", str(tmp_path / "run"), "--prompt", "1 times", "--tokens", "4"]
    assert generate.main(command) == 0


@pytest.mark.parametrize("name", ["dmc-c", "fmp", "gqa"])
def test_a_run_cut_in_two_ends_as_one_that_was_not(name, tmp_path, text):
    assert train.main(["--out", str(tmp_path / "whole"), *arguments(name, text)]) == 0
    with before_step(6, ctrl_c):
        assert train.main(["--out", str(tmp_path / "cut"), *arguments(name, text)]) == 130
    assert train.main(["--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert summary(tmp_path / "cut") == summary(tmp_path / "whole")


def test_the_immediate_target_holds_from_the_first_step():
    first, *_ = [p for p in plan(Settings(variant="immediate")) if p.name == "retrofit"]
    assert [first.target(step) for step in (0, 7, first.steps - 1)] == [4.0] * 3
    assert Settings(variant="immediate").kept() == [4.0]


def test_grouped_models_train_as_long_as_the_others():
    s = Settings(variant="gqa", cr=2.0)
    phases = {p.name: p for p in plan(s)}
    assert list(phases) == ["pretrain", "gqa", "control"]
    assert (phases["gqa"].steps, phases["gqa"].position, phases["gqa"].decay) == (
        phases["control"].steps, phases["control"].position, phases["control"].decay)


IMPOSSIBLE = {
    "no such variant": (["--variant", "h2o"], "--variant"),
    "half a token": (["--variant", "fmp", "--cr", "2.5"], "a whole number"),
    "all heads": (["--variant", "gqa", "--cr", "1"], "a whole number"),
    "several at once": (["--variant", "immediate", "--keep", "2,3"], "keeps one model"),
    "no such share of heads": (["--variant", "gqa", "--cr", "3"], "4 key-value heads cannot"),
    "more than all": (["--distill", "1.5"], "a share is at most 1"),
    "more noise than Eq. 8's": (["--final-noise", "2"], "a share is at most 1"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_a_variant_cannot_do_is_refused(case, tmp_path, text, capsys):
    flags, says = IMPOSSIBLE[case]
    assert says in refusal(train.main, ["--out", str(tmp_path / "run"), "--data", text, *flags],
                           capsys, tmp_path)


def test_heads_that_decide_together_are_not_split():
    config = VariantConfig(**vars(config_of()), variant="dmc-hardc")
    assert part_of(config, 1) == config
    with pytest.raises(InputError, match="without torchrun"):
        part_of(config, 2)


@pytest.mark.parametrize("section", [{"variant": "h2o"}, {"variant": 3}, {"variant": ["fmp"]},
                                     {"variant": "fmp"}, {"variant": "fmp", "every": 1}])
def test_a_checkpoint_of_an_unknown_variant_is_refused(section):
    facts = config_to_json(config_of())
    facts["dmc"] |= section
    with pytest.raises(InputError, match="no variant|impossible"):
        config_from_json(facts)
