"""Properties of nanodmc/megatron.py, with small checkpoints of NVIDIA's layout.

The oracle is a literal evaluation of that layout, in numpy and fp64, token by token.
"""

import ast
import enum
import io
import math
import os
import pickle
import sys
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import dmc
import dmc_fast
import generate
from conftest import refusal
from nanodmc import megatron, variants
from nanodmc.checkpoint import load
from nanodmc.files import InputError
from nanodmc.sampling import generate as continue_text
from nanodmc.tokenizer import Tokenizer
from test_dmc import through_cache

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS, HEADS, D, DIM, FFN, VOCAB, PADDED = 2, 4, 8, 32, 24, 257, 264

# ------------------------------------------------------------------------------- their checkpoints


def their_weights(groups, seed=0):
    """A model by Megatron's names, in fp64: heads that merge seldom, often, and nearly always."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[-1])
    size = HEADS // groups + 2
    weights = {"embedding.word_embeddings.weight": draw(PADDED, DIM) * 6,
               "output_layer.weight": draw(PADDED, DIM),
               "decoder.final_layernorm.weight": 1 + draw(DIM)}
    weights["embedding.word_embeddings.weight"][:, 0] = 4       # what the control rows lean on
    for n in range(LAYERS):
        qkv = draw(groups, size, D, DIM) * 2
        qkv[:, -2, -1, 0] = np.linspace(1.2, 2.6, groups)       # of keys: merge where above 5
        qkv[:, :-2, -1, 0] = np.linspace(-5, 1, groups)[:, None]        # of queries: weights
        layer = f"decoder.layers.{n}."
        weights |= {layer + "self_attention.linear_qkv.layer_norm_weight": 1 + draw(DIM),
                    layer + "self_attention.linear_qkv.weight": qkv.reshape(-1, DIM),
                    layer + "self_attention.linear_proj.weight": draw(DIM, HEADS * D),
                    layer + "mlp.linear_fc1.layer_norm_weight": 1 + draw(DIM),
                    layer + "mlp.linear_fc1.weight": draw(2 * FFN, DIM),
                    layer + "mlp.linear_fc2.weight": draw(DIM, FFN)}
    return weights


def their_settings(groups, **changes):
    return Namespace(**{**dict(
        num_layers=LAYERS, num_attention_heads=HEADS, hidden_size=DIM, ffn_hidden_size=FFN,
        kv_channels=D, group_query_attention=groups < HEADS, num_query_groups=groups,
        max_position_embeddings=64, norm_epsilon=1e-5, rotary_base=10000, swiglu=True,
        normalization="RMSNorm", position_embedding_type="rope", rotary_percent=1.0,
        untie_embeddings_and_output_weights=True, add_bias_linear=False,
        model_type=model_type()), **changes})


def model_type():
    """A member of an enumeration that nobody can import any more when the file is read."""
    module = types.ModuleType("megatron.core.enums")
    kind = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module=module.__name__)
    module.ModelType = kind
    sys.modules.update({"megatron": types.ModuleType("megatron"), module.__name__: module,
                        "megatron.core": types.ModuleType("megatron.core")})
    return kind.encoder_or_decoder


def part_of(name, w, rank, ranks):
    """What one rank of tensor parallelism has of a matrix."""
    if "norm" in name or ranks == 1:
        return w
    if "linear_fc1" in name:
        return np.concatenate([np.split(half, ranks)[rank] for half in np.split(w, 2)])
    return np.split(w, ranks, axis=int("linear_proj" in name or "linear_fc2" in name))[rank]


def write(folder, weights, settings, ranks=1, extra=None, **state):
    """A checkpoint as Megatron writes it, with all that stands beside the weights."""
    for rank in range(ranks):
        tensors = {name: torch.from_numpy(part_of(name, w, rank, ranks).copy())
                   for name, w in weights.items()}
        tensors["decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"ignored")
        tensors["decoder.layers.1.mlp.linear_fc1._extra_state"] = None
        file = folder / f"mp_rank_{rank:02}/model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save({"args": settings, "checkpoint_version": 3.0, "iteration": 2000,
                    "model": tensors | (extra or {}), "rng_state": [np.arange(3)], **state}, file)
    for name in ("megatron.core.enums", "megatron.core", "megatron"):
        sys.modules.pop(name, None)
    return folder


@pytest.fixture
def words(tmp_path):
    """A folder with the tokenizer of the model's Llama: bytes, in the place of Llama 2's."""
    folder = tmp_path / "llama"
    folder.mkdir()
    for name, content in Tokenizer.bytes().files.items():
        (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


# -------------------------------------------------------------------------------------- the oracle

def literal(weights, groups, tokens, *, window=12, offset=5.0, eps=2 ** -7, channel=-1):
    """Logits (T, VOCAB), and slots per layer and group, of a model in Megatron's layout."""
    def norm(x, w):
        return x / np.sqrt((x * x).mean() + 1e-5) * w

    def rotated(x, t):
        x = x.copy()
        x[channel] = 0
        a, b = x[:D // 2].copy(), x[D // 2:].copy()
        angle = t * 10000.0 ** (-2 * np.arange(D // 2) / D)
        x[:D // 2] = a * np.cos(angle) - b * np.sin(angle)
        x[D // 2:] = b * np.cos(angle) + a * np.sin(angle)
        x[channel] = 0
        return x

    size = HEADS // groups + 2
    slots = [[[] for _ in range(groups)] for _ in range(LAYERS)]
    segments = [[[] for _ in range(groups)] for _ in range(LAYERS)]
    logits = []
    for t, token in enumerate(tokens):
        x = weights["embedding.word_embeddings.weight"][token]
        for n in range(LAYERS):
            get = lambda name, n=n: weights[f"decoder.layers.{n}.{name}"]
            h = norm(x, get("self_attention.linear_qkv.layer_norm_weight"))
            qkv = (get("self_attention.linear_qkv.weight") @ h).reshape(groups, size, D)
            heads = []
            for g in range(groups):
                *queries, key, value = qkv[g]
                omega = 1 / (1 + np.exp(-np.mean([q[channel] for q in queries]) - offset)) + eps
                if t and key[channel] > 5:
                    slots[n][g].pop()
                else:
                    segments[n][g] = []
                segments[n][g] = [*segments[n][g], (omega, key, value)][-window:]
                total = sum(w for w, _, _ in segments[n][g])
                k, v = (sum(s[0] * s[i] for s in segments[n][g]) / total for i in (1, 2))
                slots[n][g].append((rotated(k, t), v))
                for q in queries:
                    scores = np.array([rotated(q, t) @ k for k, _ in slots[n][g]]) / np.sqrt(D)
                    p = np.exp(scores - scores.max())
                    heads.append(sum(a * v for a, (_, v) in zip(p / p.sum(), slots[n][g],
                                                                strict=True)))
            x = x + get("self_attention.linear_proj.weight") @ np.concatenate(heads)
            h = norm(x, get("mlp.linear_fc1.layer_norm_weight"))
            gate, up = np.split(get("mlp.linear_fc1.weight") @ h, 2)
            x = x + get("mlp.linear_fc2.weight") @ (gate / (1 + np.exp(-gate)) * up)
        final = norm(x, weights["decoder.final_layernorm.weight"])
        logits.append(weights["output_layer.weight"][:VOCAB] @ final)
    return np.stack(logits), np.array([[len(s) for s in layer] for layer in slots])


TOKENS = np.random.default_rng(3).integers(0, VOCAB, 40)


@pytest.mark.parametrize("ops", [dmc, dmc_fast], ids=["reference", "fast"])
@pytest.mark.parametrize("groups", [4, 2])
def test_a_converted_model_is_the_literal_one(tmp_path, words, groups, ops):
    weights = their_weights(groups)
    write(tmp_path / "theirs", weights, their_settings(groups))
    megatron.convert(tmp_path / "theirs", tmp_path / "ours", words)
    model = load(tmp_path / "ours", ops)
    expected, slots = literal(weights, groups, TOKENS)
    assert slots.min() < len(TOKENS) / 12 and slots.max() > len(TOKENS) / 2     # the window counts
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(TOKENS[None]))
        cached, cache = through_cache(model, torch.from_numpy(TOKENS[None]), 7)
    for ours in (logits, cached):
        assert np.abs(ours[0].numpy() - expected).max() < 1e-10
    assert (cache.lengths[:, 0].numpy() == slots).all()


@pytest.mark.skipif("DMC_MEGATRON" not in os.environ, reason="DMC_MEGATRON names no file")
@pytest.mark.parametrize("groups", [4, 2])
def test_decisions_averages_and_mask_are_those_of_the_authors_code(groups, monkeypatch):
    """DMC_MEGATRON: megatron/contrib/dmc/dmc.py of Megatron-LM's branch dmc."""
    source, bfloat16 = Path(os.environ["DMC_MEGATRON"]).read_text(), torch.finfo(torch.bfloat16)
    parts = {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
             if hasattr(node, "name")}
    theirs = {"torch": torch, "F": torch.nn.functional, "math": math, "MASK_CONST": -50000.0,
              "layer_decisions": [],
              "get_args": lambda: Namespace(dmc_init_val=5, dmc_window_size=12, dmc_temp=0.1)}
    for name in ("get_decisions", "_poolsum", "poolsum", "DynamicPooler"):
        exec(parts[name], theirs)
    monkeypatch.setattr(torch, "finfo", lambda dtype: bfloat16)      # whose eps they add
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 50, D) * 3 for heads in (HEADS, groups, groups))
    k[..., -1] += 6
    q[..., -1] -= 10
    ours = [megatron.last_channel_first(x[..., None])[..., 0] for x in (q, k)]
    config = megatron.config_of(their_settings(groups), VOCAB, "here")
    alpha, keep, omega = variants.weigh_with_offset(*ours, config)
    k_mean, v_mean = dmc.accumulate(ours[1], v, alpha, omega, 12)
    pooler = theirs["DynamicPooler"]().eval()
    _, keys, values, mask = pooler.downsample(
        *(x.permute(2, 0, 1, 3) for x in (q, k, v)), optimized_attn_bias=False)
    keys, values = (x.permute(1, 2, 0, 3)[:, ::HEADS // groups] for x in (keys, values))
    keys = megatron.last_channel_first(keys[..., None])[..., 0]
    assert 0.3 < alpha.mean() < 0.8
    assert (k_mean - keys)[..., 1:].abs().max() < 1e-4
    assert (v_mean - values).abs().max() < 1e-4
    visible = (mask > -1).tril()
    assert (visible == (dmc.dmc_mask(keep) > -1).repeat_interleave(HEADS // groups, 1)).all()


@pytest.mark.parametrize("fault", [dict(window=11), dict(offset=0.0), dict(eps=0.0),
                                   dict(channel=0)])
def test_the_oracle_would_see_a_fault(fault):
    weights = their_weights(4)
    right, wrong = literal(weights, 4, TOKENS)[0], literal(weights, 4, TOKENS, **fault)[0]
    assert np.abs(right - wrong).max() > 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("place", ["", "iter_0002000", "release", "the file"])
def test_every_layout_gives_the_same_weights(tmp_path, ranks, place):
    weights = their_weights(2)
    folder = tmp_path / "theirs"
    write(folder if place in ("", "the file") else folder / place, weights, their_settings(2),
          ranks)
    name = {"release": "release"}.get(place, "2000")
    (folder / "latest_checkpointed_iteration.txt").write_text(name)
    write(folder / "iter_0001000", their_weights(2, seed=1), their_settings(2))      # an older one
    source = folder / "mp_rank_00/model_optim_rng.pt" if place == "the file" else folder
    if place == "the file" and ranks == 2:
        with pytest.raises(InputError, match="other tensors than its settings say"):
            megatron.read_model(source, VOCAB)
        return
    again = megatron.read_model(source, VOCAB).state_dict()
    expected = megatron.renamed({k: torch.from_numpy(w) for k, w in weights.items()},
                                megatron.config_of(their_settings(2), VOCAB, "here"))
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in again)


def test_settings_of_their_own_method_count(tmp_path):
    config = megatron.config_of(their_settings(4, dmc_window_size=0, dmc_init_val=3, dmc_temp=0.5),
                                VOCAB, "here")
    assert (config.window, config.c, config.tau) == (None, 3.0, 0.5)


# ----------------------------------------------------------------------------------------- refusals

class Touch:
    """Unpickled in full, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_that_is_pickled_runs(tmp_path):
    victim = tmp_path / "victim"
    write(tmp_path / "theirs", their_weights(4), their_settings(4), optimizer=Touch(victim))
    with pytest.raises(InputError, match="holds more than weights and settings: .*open"):
        megatron.read_model(tmp_path / "theirs", VOCAB)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Touch(victim))).close()
    assert victim.exists()


SOURCES = {
    "another activation": (dict(settings=dict(swiglu=False)), "swiglu False"),
    "two stages": (dict(settings=dict(pipeline_model_parallel_size=2)), "pipeline_model_parallel"),
    "not retrofitted": (dict(settings=dict(dmc_is_stage_one=True)), "dmc_is_stage_one True"),
    "no layers": (dict(settings=dict(num_layers=None)), "n_layer is None"),
    "more layers": (dict(settings=dict(num_layers=3)), "other tensors than its settings say"),
    "fewer layers": (dict(settings=dict(num_layers=1)), "unexpected: decoder.layers.1."),
    "other heads": (dict(settings=dict(kv_channels=16)), "other tensors than"),
    "a bias": (dict(extra={"output_layer.bias": torch.zeros(3)}), "unexpected: output_layer.bias"),
    "no tensor": (dict(extra={"output_layer.weight": "none"}), "no tensor at output_layer.weight"),
    "a text as a number": (dict(settings=dict(rotary_base="x")), "rotary embedding is 'x'"),
    "no number": (dict(settings=dict(dmc_init_val=None)), "c is None"),
    "a tensor as a setting": (dict(settings=dict(swiglu=torch.ones(2))), "swiglu tensor"),
    "a tensor as a window": (dict(settings=dict(dmc_window_size=torch.ones(2))),
                             "window is tensor"),
    "a name that is no text": (dict(extra={0: torch.zeros(3)}), "no tensor at 0"),
    "an old layout": (dict(checkpoint_version=1.0), "an older layout"),
    "no settings": (dict(args={}), "lacks a model and its settings"),
    "no model": (dict(model=None), "lacks a model and its settings"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_other_models_are_refused(case, tmp_path, words, capsys):
    changes, says = SOURCES[case]
    settings = their_settings(4, **changes.get("settings", {}))
    changes = {name: value for name, value in changes.items() if name != "settings"}
    write(tmp_path / "theirs", their_weights(4), settings, **changes)
    said = refusal(generate.main, ["--convert", str(tmp_path / "theirs"), "--tokenizer", str(words),
                                   "--out", str(tmp_path / "ours")], capsys, tmp_path)
    assert says in said


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    write(tmp_path / "theirs", their_weights(4), their_settings(4))
    file = tmp_path / "theirs/mp_rank_00/model_optim_rng.pt"
    whole = file.read_bytes()
    for content, says in ((whole[:1000], "truncated or damaged"), (b"", "truncated or damaged"),
                          (b"<html>", "a web page"),
                          (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=says):
            megatron.read_model(tmp_path / "theirs", VOCAB)
    file.parent.rename(file.parent.with_name("mp_rank_01"))
    for folder, says in ((tmp_path / "theirs", "fetch the rest"), (tmp_path, "holds no mp_rank")):
        with pytest.raises(InputError, match=says):
            megatron.read_model(folder, VOCAB)


@pytest.mark.parametrize("arguments, says", [
    (["--out", "ours"], "needs --out, a new folder, and --tokenizer"),
    (["--tokenizer", "llama"], "needs --out, a new folder, and --tokenizer"),
    (["--tokenizer", "llama", "--out", "llama"], "llama is not empty"),
    (["--ckpt", "llama"], "--ckpt has no effect"),
    (["--tokenizer", "theirs", "--out", "ours"], "no tokenizer.json"),
    (["--tokenizer", "llama", "--out", "llama/tokenizer.json"], "is not empty")])
def test_the_command_says_what_it_lacks(tmp_path, words, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "theirs", their_weights(4), their_settings(4))
    assert says in refusal(generate.main, ["--convert", "theirs", *arguments], capsys, tmp_path)


# ---------------------------------------------------------------------------------- the commands

def test_the_command_converts_and_the_model_runs(tmp_path, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "theirs", their_weights(4), their_settings(4))
    assert generate.main(["--convert", "theirs", "--tokenizer", "llama", "--out", "ours"]) == 0
    said = capsys.readouterr()
    assert "ours has the model: " in said.out
    model, tokenizer = load(tmp_path / "ours", dmc), Tokenizer.from_folder(tmp_path / "ours")
    assert generate.main(["--ckpt", "ours", "--prompt", "abc", "--tokens", "8", "--temperature",
                          "0"]) == 0
    with torch.no_grad():
        greedy = continue_text(model, model.new_cache(1), tokenizer.encode("abc"), 8,
                               lambda logits, _: int(logits.argmax()))
        text = tokenizer.decode(list(greedy))
    assert text in capsys.readouterr().out


def test_a_name_or_a_folder_says_how_to_convert(tmp_path, capsys):
    said = refusal(generate.main, ["--ckpt", "nvidia/Llama-2-7B-DMC-4x"], capsys, tmp_path)
    assert "hf download nvidia/Llama-2-7B-DMC-4x --local-dir" in said
    assert "meta-llama/Llama-2-7b-hf" in said and "--convert Llama-2-7B-DMC-4x" in said
    write(tmp_path / "theirs", their_weights(4), their_settings(4))
    said = refusal(generate.main, ["--ckpt", str(tmp_path / "theirs")], capsys, tmp_path)
    assert f"--convert {tmp_path / 'theirs'}" in said
