"""Properties of nanodmc/control_pair.py: what may change in a model, and what must not."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dmc
import train
from conftest import SHORT, TINY, curve, interrupted, refusal, same_weights, two_processes
from nanodmc import checkpoint, control_pair
from nanodmc.config import config_from_json, config_to_json
from nanodmc.control_pair import Choice, apply, choose, expected_loss, lost, measure
from nanodmc.files import InputError
from test_dmc import assert_close, both, config_of, groups, lengths, model_of, seeds, through_cache

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = 4                            # of heads with 8 channels
pairs = st.integers(0, PAIRS - 1)
ROPE = {"none": None, "linear": {"rope_type": "linear", "factor": 2.0},
        "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}
rng = torch.Generator


def drawn(config, pair, seed):
    degrees = torch.randint(180, (config.n_layer, config.n_kv_head),
                            generator=rng().manual_seed(seed))
    return Choice(pair, degrees.tolist())


def tokens(B=2, T=20, seed=0):
    return torch.randint(29, (B, T), generator=rng().manual_seed(seed))


@both
@pytest.mark.parametrize("rope", ROPE)
@given(seeds, groups, pairs)
def test_all_scores_stay_what_they_were(ops, rope, seed, heads, pair):
    plain = model_of(seed, heads, ops=ops, rope_scaling=ROPE[rope])
    moved = model_of(seed, heads, ops=ops, rope_scaling=ROPE[rope], control_pair=pair)
    apply(drawn(moved.config, pair, seed), moved)
    ours, theirs = (model(tokens(), gain=1.0)[0] for model in (moved, plain))
    assert_close(ours, theirs)
    if pair:                                 # and the frequencies did move with their channels
        still = model_of(seed, heads, ops=ops, rope_scaling=ROPE[rope])
        apply(drawn(moved.config, pair, seed), still)
        assert (still(tokens(), gain=1.0)[0] - theirs).abs().max() > 1e-3


@both
@given(seeds, groups, pairs, lengths)
def test_a_moved_pair_is_the_same_in_cache_and_training_form(ops, seed, heads, pair, T):
    model = model_of(seed, heads, ops=ops, control_pair=pair)
    x = tokens(T=T, seed=seed)
    assert_close(through_cache(model, x, 3)[0], model(x)[0])


@given(seeds, pairs, st.integers(0, 179), st.integers(1, 9))
def test_the_expected_loss_is_the_mean_over_all_queries_keys_and_positions(seed, pair, degrees, T):
    """Literally: the score of every query on every key, with the channel and without it."""
    config, draw = config_of(), rng().manual_seed(seed)
    q, k = torch.randn(2, 5, 8, generator=draw, dtype=torch.float64)
    k = k - k.mean(0)
    here = [pair, pair + PAIRS]                                    # nothing but the pair
    q, k = (torch.zeros_like(x).index_copy(1, torch.tensor(here), x[:, here]) for x in (q, k))
    angle = math.radians(degrees)
    moved = dmc.Config(**{**vars(config), "control_pair": pair})
    rows = [control_pair.turned(x.T, pair, math.cos(angle), math.sin(angle)).T for x in (q, k)]
    cos, sin = dmc.rotary_table(moved, T)
    at = [torch.stack([dmc.rotate_heads(x[:, None].expand(-1, T, -1), cos, sin, gain)
                       for x in rows]) for gain in (1.0, 0.0)]     # (2, 5, T, 8)
    scores = [torch.einsum("amd,bnd->mnab", q, k) for q, k in at]
    wrong = ((scores[0] - scores[1]) ** 2).mean((2, 3))
    literal = wrong[torch.tril_indices(T, T).unbind()].mean()
    q, k = (x[:, here].T @ x[:, here] / len(x) for x in (q, k))
    fill = lambda x: x.expand(PAIRS, 1, 1, 2, 2)
    ours = expected_loss(fill(q), fill(k), lost(config, T), degrees)[pair, 0, 0]
    assert ours.item() == pytest.approx(literal.item(), rel=1e-9, abs=1e-12)


@given(seeds, groups)
def test_what_is_measured_are_moments_of_queries_and_keys(seed, heads):
    model, x = model_of(seed, heads, dmc=False), tokens(3)
    q, k = measure(model, list(x.split(1)))
    assert q.shape == k.shape == (PAIRS, 2, heads[1], 2, 2)
    layer = model.layers[0]
    h = layer.input_layernorm(model.embed_tokens(x)).flatten(0, 1)
    for ours, proj, middle in ((q, layer.self_attn.q_proj, 0), (k, layer.self_attn.k_proj, 1)):
        y = proj(h).view(len(h), heads[1], -1, 8)
        y = y - middle * y.mean(0)
        for pair in range(PAIRS):
            part = y[..., [pair, pair + PAIRS]].transpose(0, 1).flatten(1, 2)      # (G, samples, 2)
            assert_close(ours[pair, 0], part.mT @ part / part.size(1))
    assert not layer.self_attn.q_proj._forward_hooks


@given(seeds, groups, pairs, st.integers(0, 179))
def test_a_channel_that_no_score_needs_is_found(seed, heads, pair, degrees):
    """It was hidden in a pair, at an angle: the pair's second channel is all the scores know."""
    model = model_of(seed, heads, dmc=False)
    G, angle = heads[1], math.radians(degrees)
    with torch.no_grad():
        for layer in model.layers:
            for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                rows = proj.weight.view(-1, 8, proj.weight.size(-1))
                a = rows[:, pair + PAIRS] * 1e-3                   # so that nothing leaks either
                rows[:, pair], rows[:, pair + PAIRS] = -math.sin(angle) * a, math.cos(angle) * a
    choice = choose(model, list(tokens(4).split(1)))
    assert choice.pair == pair
    assert len(choice.degrees) == 2 and all(len(row) == G for row in choice.degrees)
    freed = model_of(seed, heads, control_pair=pair)
    freed.load_state_dict(model.state_dict())
    apply(choice, freed)
    assert_close(freed(tokens(), gain=0.0)[0], model(tokens())[0], 1e-4)


def test_config_json_names_the_pair():
    config = config_of(control_pair=3)
    assert config_from_json(config_to_json(config)) == config
    older = config_to_json(config_of())
    del older["dmc"]["control_pair"]
    assert config_from_json(older).control_pair == 0


@pytest.mark.parametrize("pair", [-1, PAIRS, 1.5, "x", None, True])
def test_an_impossible_pair_is_refused(pair):
    facts = config_to_json(config_of())
    facts["dmc"]["control_pair"] = pair
    with pytest.raises(InputError, match="control_pair"):
        config_from_json(facts)


# ------------------------------------------------------------------------------------------ a run

CHOOSING = ["--choose-pair", *SHORT]


def test_a_run_that_chooses_goes_on_with_its_choice(tmp_path, text, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main(["--out", str(whole), "--data", text, *TINY, *CHOOSING]) == 0
    kept = json.loads((whole / "control-pair.json").read_text())
    assert f"rotary pair {kept['pair']} is freed of one" in capsys.readouterr().out
    for folder in ("freed", "cr3"):
        assert checkpoint.load(whole / folder).config.control_pair == kept["pair"]
    assert interrupted(cut, text, arguments=CHOOSING, at=4) == 130     # in the middle of free
    monkeypatch.setattr(control_pair, "choose", None)                  # nothing is chosen again
    assert train.main(["--resume", "--out", str(cut)]) == 0
    assert curve(cut) == curve(whole) and same_weights(cut, whole)


def test_a_damaged_choice_is_refused_and_made_anew(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert interrupted(out, text, arguments=CHOOSING, at=4) == 130
    kept = out / "control-pair.json"
    kept.write_text(kept.read_text().replace('"pair": ', '"pair": 1'))
    assert "--redo" in refusal(train.main, ["--resume", "--out", str(out)], capsys, out)
    assert train.main(["--resume", "--redo", "--out", str(out)]) == 0
    assert json.loads(kept.read_text())["pair"] < PAIRS


ONE_OF_TWO = """
import sys, torch, train
from nanodmc import control_pair
torch.set_num_threads(1)
choose = control_pair.choose
def chosen(model, sequences):
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())
    return choose(model, sequences)
control_pair.choose = chosen
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_processes_choose_as_one_does(tmp_path, text):
    """Each holds a part of every weight, and both read all of the sequences."""
    out, script = [tmp_path / "one", tmp_path / "two"], tmp_path / "script.py"
    arguments = ["--data", text, *TINY, *CHOOSING, "--pretrain-steps", "1", "--free-steps", "1",
                 "--retrofit-steps", "1", "--micro-batch", "1"]
    assert train.main(["--out", str(out[0]), *arguments]) == 0
    script.write_text(ONE_OF_TWO)
    done = two_processes(script, "--out", out[1], *arguments)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((path / "control-pair.json").read_text()) for path in out)
    assert one == two
