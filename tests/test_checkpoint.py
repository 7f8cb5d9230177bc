"""Properties of nanodmc/checkpoint.py: saving, loading and finding models, and the refusals."""

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

import generate
import train
from conftest import POINTER, RETROFIT, edit_json, largest_error, lines_of, oracle, refusal
from dmc import Transformer
from nanodmc import checkpoint, files, weights
from nanodmc.checkpoint import load, save
from nanodmc.config import shape
from nanodmc.files import InputError
from nanodmc.sampling import next_logits
from nanodmc.tokenizer import Tokenizer
from test_dmc import config_of, groups, seeds

# ------------------------------------------------------------------------------- saving and loading

@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_are_bit_exact(tmp_path, tied):
    model = Transformer(config_of((8, 2), window=None, tie_embeddings=tied))
    save(model, tmp_path / "a", phase="solidify", cr=3.9)
    again = load(tmp_path / "a")
    assert again.config == model.config
    tokens = torch.randint(0, 29, (2, 9))
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    facts = json.loads((tmp_path / "a/config.json").read_text())
    assert facts["dmc"] == {"method": "dmc", "window": None, "tau": 0.1, "c": 0.5,
                            "control_pair": 0, "phase": "solidify", "cr": 3.9}
    assert facts["model_type"] == "dmc_llama"
    assert load(tmp_path / "a", dmc=False).config.dmc is False


@pytest.mark.parametrize("dies_in", ["save_file", "replace", "second file"])
def test_a_kill_during_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, dies_in):
    old, new = Transformer(config_of()), Transformer(config_of(n_layer=1))
    save(old, tmp_path)

    def half_a_file(weights, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    def die(*_):
        raise KeyboardInterrupt

    if dies_in == "save_file":
        monkeypatch.setattr(weights, "save_file", half_a_file)
    elif dies_in == "replace":
        monkeypatch.setattr(Path, "replace", die)
    else:
        monkeypatch.setattr(Path, "write_text", die)
    with pytest.raises(KeyboardInterrupt):
        save(new, tmp_path)
    monkeypatch.undo()
    survivor, warned = old, contextlib.nullcontext()             # whole, either way
    if dies_in == "second file":
        survivor, warned = new, pytest.warns(UserWarning, match="differs")
    with warned:
        loaded = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in
               zip(loaded.parameters(), survivor.parameters(), strict=True))


def checkpoint_is(folder, model):
    loaded = load(folder)
    return loaded.config == model.config and all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*differs from what was saved")
@pytest.mark.parametrize("before, after",
                         [(0, 0), (0, 9000), (9000, 0), (9000, 9000), (9000, 7000)])
def test_a_kill_at_any_moment_of_saving_leaves_one_whole_checkpoint(tmp_path, before, after):
    """The process dies at each of its changes to the folder in turn. before, after: bytes per
    shard of the old and the new checkpoint; 0: one file."""
    torch.manual_seed(0)
    old, new = Transformer(config_of()), Transformer(config_of(n_layer=3))
    moments, seen = 0, set()
    while True:
        folder = tmp_path / str(moments)
        save(old, folder, shard_bytes=before or 10 ** 9)
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
                save(new, folder, shard_bytes=after or 10 ** 9)
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
    save(new, folder, shard_bytes=after or 10 ** 9)
    files = {f.name for f in folder.iterdir()}
    weights = [name for name in files if name.endswith(".safetensors")]
    assert len(weights) == len(checkpoint.weight_files(folder))
    assert ("model.safetensors" in files) == (after == 0)


@pytest.mark.filterwarnings("ignore")        # of a damaged copy of the configuration
@given(st.integers(0, 10 ** 6), st.integers(0, 255))
def test_damaged_checkpoints_are_refused_in_a_sentence(tmp_path_factory, at, byte):
    folder = tmp_path_factory.mktemp("damaged")
    save(Transformer(config_of(n_layer=1)), folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:at % len(data)])
    with pytest.raises(InputError, match="truncated"):
        load(folder)
    if data[at % header] != byte:
        data[at % header] = byte             # a flipped byte in the header: refused, or harmless
        file.write_bytes(data)
        try:
            load(folder)
        except InputError as error:
            assert "\n" not in str(error)


def test_a_file_that_is_sound_is_not_called_damaged(tmp_path, plain, monkeypatch):
    folder = shutil.copytree(plain, tmp_path / "model")
    faults = {"does not fit into memory": RuntimeError("can't allocate memory: you tried 9 bytes"),
              "cannot be read (Permission denied)": PermissionError(13, "Permission denied"),
              "has quantized weights": SafetensorError("Dtype not understood: F6_E2M3"),
              "cannot be understood as weights (KeyError": KeyError("a fault of a library")}
    for says, fault in faults.items():
        def fails(*args, fault=fault, **kwargs):
            raise fault

        monkeypatch.setattr(weights, "safe_open", fails)
        with pytest.raises(InputError) as refused:
            load(folder)
        assert says in str(refused.value) and "damaged" not in str(refused.value)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_all_files_of_a_checkpoint_have_the_permissions_that_the_umask_allows(tmp_path, umask):
    before = os.umask(umask)
    try:
        for size in (10 ** 9, 2000):
            save(Transformer(config_of()), tmp_path / str(size), Tokenizer.bytes(), size)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("*/*")}
    assert len(modes) > 5 and set(modes.values()) == {0o666 & ~umask}, modes


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    model = Transformer(config_of(n_layer=1))
    model.lm_head = torch.nn.Linear(16, 28, bias=False)
    save(model, tmp_path)
    with pytest.raises(InputError, match="lm_head.weight"):
        load(tmp_path)


# --------------------------------------------------------------------------- transformers as oracle

SCALED = st.builds(lambda f: {"rope_type": "linear", "factor": f}, st.sampled_from([2.0, 4.0]))
LLAMA3 = st.builds(
    lambda f, low, context: {"rope_type": "llama3", "factor": f, "low_freq_factor": low,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": context},
    st.sampled_from([2.0, 8.0]), st.sampled_from([0.5, 1.0]), st.sampled_from([16, 64]))
PLAIN = st.builds(
    lambda heads, layers, head_dim, tied, theta, rope: config_of(
        heads, n_layer=layers, head_dim=head_dim, tie_embeddings=tied, rope_theta=theta,
        rope_scaling=rope, dmc=False, window=12),
    groups, st.integers(1, 3), st.sampled_from([4, 8, 10]), st.booleans(),
    st.sampled_from([100.0, 10000.0, 500000.0]), st.one_of(st.none(), SCALED, LLAMA3))


def hugging_face_model(config, seed, dtype=torch.float32):
    """The same shape in transformers, with weights so large that attention is far from even."""
    transformers = oracle("transformers")
    torch.manual_seed(seed)
    rope = {**(config.rope_scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.ffn_dim,
        head_dim=config.head_dim, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings, rope_parameters=rope, initializer_range=0.3))
    return model.to(dtype).eval()


@given(PLAIN, seeds)
@settings(max_examples=20)
def test_logits_equal_transformers(tmp_path_factory, config, seed):
    folder = tmp_path_factory.mktemp("hf")
    theirs = hugging_face_model(config, seed)
    theirs.save_pretrained(folder)
    ours = load(folder, c=config.c)
    assert ours.config == config
    tokens = torch.randint(0, config.vocab_size, (2, config.max_seq_len))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert largest_error(ours(tokens)[0], expected) < 1e-4
        cache, parts = ours.Cache(config, 2), tokens.split([20, 1, 30, 13], dim=1)
        cached = torch.cat([ours(part, cache)[0] for part in parts], dim=1)
        assert largest_error(cached, expected) < 1e-4
        assert largest_error(next_logits(ours, tokens, None), expected[:, -1]) < 1e-4


def test_half_precision_is_as_good_as_transformers(tmp_path):
    ours, theirs = [], []
    for seed in range(8):
        model = hugging_face_model(config_of((8, 2), dmc=False), seed)
        tokens = torch.randint(0, 29, (2, 64))
        exact = model.double()(tokens).logits
        model.to(torch.bfloat16).save_pretrained(tmp_path / str(seed))
        with torch.no_grad():
            theirs.append((model(tokens).logits - exact).norm().item())
            ours.append((load(tmp_path / str(seed))(tokens)[0] - exact).norm().item())
    assert sum(ours) < 1.2 * sum(theirs)


def in_other_forms(folder, model):
    """Folders with the same weights: in shards, pickled, pickled in shards, and with a
    configuration in the older style, in torch.save's format before PyTorch 1.6."""
    model.save_pretrained(folder / "shards", max_shard_size="10KB")
    assert (folder / "shards/model.safetensors.index.json").is_file()
    facts = json.loads((folder / "shards/config.json").read_text())
    weights = model.state_dict()
    for name in ("pickled", "pickled-shards", "old"):
        (folder / name).mkdir()
    torch.save(weights, folder / "pickled/pytorch_model.bin")
    where = {name: f"pytorch_model-{1 + (i > 5)}.bin" for i, name in enumerate(weights)}
    for file in set(where.values()):
        part = {name: w for name, w in weights.items() if where[name] == file}
        torch.save(part, folder / "pickled-shards" / file)
    index = json.dumps({"weight_map": where})
    (folder / "pickled-shards/pytorch_model.bin.index.json").write_text(index)
    rope = facts.pop("rope_parameters")
    theta, scaling = rope.pop("rope_theta"), {"type": rope.pop("rope_type"), **rope}
    old = {**facts, "rope_theta": theta, "rope_scaling": scaling}
    del old["head_dim"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)   # as in old ones
    torch.save(weights, folder / "old/pytorch_model.bin", _use_new_zipfile_serialization=False)
    newer = facts | {"rope_parameters": {**scaling, "rope_theta": theta}}
    for name, config in (("pickled", newer), ("pickled-shards", old), ("old", old)):
        (folder / name / "config.json").write_text(json.dumps(config))
    return [folder / name for name in ("shards", "pickled", "pickled-shards", "old")]


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0}])
def test_every_layout_of_a_checkpoint_is_read(tmp_path, rope):
    config = config_of((4, 2), head_dim=None, rope_scaling=rope, rope_theta=300.0)
    model = hugging_face_model(config, 0)
    tokens = torch.randint(0, 29, (1, 30))
    expected = model(tokens).logits
    for folder in in_other_forms(tmp_path, model):
        assert largest_error(load(folder)(tokens)[0], expected) < 1e-4, folder


def test_transformers_reads_a_plain_model_and_refuses_a_dmc_model(tmp_path):
    transformers = oracle("transformers")
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}
    read = transformers.AutoModelForCausalLM.from_pretrained
    for tied in (False, True):
        plain = Transformer(config_of((8, 2), dmc=False, tie_embeddings=tied, rope_scaling=rope,
                                      rope_theta=700.0))
        save(plain, tmp_path / "plain", Tokenizer.bytes(), shard_bytes=20_000)
        theirs = read(tmp_path / "plain").eval()
        tokens = torch.randint(0, 29, (2, 40))
        assert largest_error(plain(tokens)[0], theirs(tokens).logits) < 1e-4
        assert theirs.config.eos_token_id == 256
    save(Transformer(config_of((8, 2))), tmp_path / "dmc")
    with pytest.raises((ValueError, KeyError), match="dmc_llama|custom code"):
        read(tmp_path / "dmc")


@given(PLAIN, st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
       st.sampled_from([600, 3000, 5 * 10 ** 9]), seeds)
def test_saving_and_loading_is_bit_exact(tmp_path_factory, config, decides, dtype, shard_bytes,
                                         seed):
    torch.manual_seed(seed)
    model = Transformer(replace(config, dmc=decides)).to(dtype)
    folder = tmp_path_factory.mktemp("exact")
    save(model, folder, Tokenizer.bytes(), shard_bytes=shard_bytes)
    again = load(folder, c=config.c)
    assert again.config == model.config
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == dtype
    assert (again.lm_head.weight is again.embed_tokens.weight) == config.tie_embeddings
    sizes = [f.stat().st_size for f in folder.glob("*.safetensors")]
    largest = max(p.nbytes for p in model.parameters())
    assert (len(sizes) > 1) == (sum(p.nbytes for p in model.parameters()) > shard_bytes)
    assert all(size < max(shard_bytes, largest) + 4000 for size in sizes)        # and a header
    assert load(folder, dtype=torch.float64).lm_head.weight.dtype == torch.float64


# ----------------------------------------------------------------------------- unusable checkpoints

def rewrite(folder, change, **facts):
    """Write the weights anew, by safetensors itself, after change(weights), and put facts into
    config.json."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda c: c.update(facts))


def with_header(folder, change, length=None):
    """Put change(header) into model.safetensors, or another length before its header."""
    data = (folder / "model.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    change(header)
    text = json.dumps(header).encode()
    prefix = (len(text) if length is None else length).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(prefix + text + data[8 + n:])


def no_change(value):
    pass


def with_length(length):
    return lambda folder: with_header(folder, no_change, length)


def with_norm(**facts):
    """With another entry of the last norm in the header of model.safetensors."""
    return lambda folder: with_header(folder, lambda header: header[NORM].update(facts))


def with_weights(change):
    return lambda folder: rewrite(folder, change)


def configured(**facts):
    return lambda folder: rewrite(folder, no_change, **facts)


def with_config(change):
    """The weights without their copy of config.json, and then change(path of config.json)."""
    return lambda folder: (rewrite(folder, no_change), change(folder / "config.json"))


def with_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def instead(name, write):
    """Without model.safetensors, but with the file that write(path) makes under another name."""
    return lambda folder: ((folder / "model.safetensors").unlink(), write(folder / name))


def index_of(text):
    return instead("model.safetensors.index.json", lambda path: path.write_text(text))


def pickle_of(value, old=False, cut=0):
    """old: in torch.save's format before PyTorch 1.6. cut: how many bytes are missing."""
    def write(path):
        torch.save(value, path, _use_new_zipfile_serialization=not old)
        path.write_bytes(path.read_bytes()[:path.stat().st_size - cut])
    return instead("pytorch_model.bin", write)


def program(path):
    """What torch.jit.save writes, as far as torch.load looks at it."""
    with zipfile.ZipFile(path, "w") as file:
        for name in ("version", "constants.pkl"):
            file.writestr(f"program/{name}", "3")


NORM = "model.norm.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
BAD_CHECKPOINTS = {
    "header length": (with_length(2 ** 62), "truncated or damaged"),
    "header length just too large": (with_length(99_000_000), "truncated or damaged"),
    "header length zero": (with_length(0), "truncated or damaged"),
    "offsets beyond the file": (with_norm(data_offsets=[0, 2 ** 50]), "damaged"),
    "offsets reversed": (lambda f: with_header(f, lambda h: h[NORM]["data_offsets"].reverse()),
                         "damaged"),
    "overlapping ranges": (with_norm(data_offsets=[0, 64]), "damaged"),
    "negative offset": (with_norm(data_offsets=[-64, 0]), "damaged"),
    "unknown dtype": (with_norm(dtype="F7"), "damaged"),
    "another dtype": (with_norm(dtype="F16"), "damaged"),
    "a shape of another size": (with_norm(shape=[2 ** 40]), "damaged"),
    "integers": (with_weights(lambda w: w.update({NORM: w[NORM].int()})),
                 "quantized.*norm.weight"),
    "eight-bit floats": (with_weights(lambda w: w.update({NORM: w[NORM].to(torch.float8_e4m3fn)})),
                         "quantized"),
    "a tensor missing": (with_weights(lambda w: w.pop(NORM)), "missing: norm.weight"),
    "a tensor too many": (with_weights(lambda w: w.update(extra=torch.ones(1))),
                          "unexpected: extra"),
    "a bias": (with_weights(lambda w: w.update({Q_BIAS: torch.ones(1)})), "q_proj.b"),
    "a tensor misshapen": (with_weights(lambda w: w.update({NORM: torch.ones(3)})),
                           r"norm.weight \(3,\), not \(16"),
    "rows too few": (configured(vocab_size=300), "embed_tokens.weight"),
    "layers beyond count": (configured(num_hidden_layers=4096), "too few for"),
    "layers without end": (configured(num_hidden_layers=10 ** 12), "n_layer is 1000000000000;"),
    "an output matrix although tied": (configured(tie_word_embeddings=True),
                                       "ties the output matrix"),
    "sizes enormous": (configured(hidden_size=2 ** 50, head_dim=2 ** 20),
                       "dim is 1125899906842624;"),
    "a size negative": (configured(hidden_size=-16), "dim is -16"),
    "a size no number": (configured(hidden_size="sixteen"), "dim is 'sixteen'"),
    "norm_eps no number": (configured(rms_norm_eps="small"), "norm_eps is 'small'"),
    "a size missing": (with_config(lambda path: edit_json(path, lambda c: c.pop("hidden_size"))),
                       "dim"),
    "another architecture": (configured(model_type="gpt2"), "type gpt2"),
    "no architecture": (configured(model_type=None), "type None"),
    "attention bias": (configured(attention_bias=True), "attention bias"),
    "MLP bias": (configured(mlp_bias=True), "bias in its MLP"),
    "sliding window": (configured(model_type="mistral", sliding_window=16), "sliding-window"),
    "quantized": (configured(quantization_config={"quant_method": "gptq"}), "quantized"),
    "another activation": (configured(hidden_act="gelu"), "gelu"),
    "another rotary embedding": (configured(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
                                 "yarn"),
    "rotary embedding by halves": (configured(rope_scaling={"rope_type": "llama3", "factor": 4.0}),
                                   "low_freq_factor"),
    "part of the channels rotated": (configured(partial_rotary_factor=0.5), "partial"),
    "another method": (configured(model_type="dmc_llama", dmc={"method": "h2o"}), "h2o"),
    "rope_theta no number": (configured(rope_theta="large"), "rope_theta"),
    "configuration a list": (with_config(lambda path: path.write_text("[]")),
                             "no usable configuration"),
    "configuration cut off": (with_config(lambda path: path.write_text('{"hid')), "damaged"),
    "configuration missing": (with_config(lambda path: path.unlink()), "config.json is missing"),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(),
                        "no model.safetensors"),
    "an empty file": (with_file("model.safetensors", b""), "damaged"),
    "weights a pointer": (with_file("model.safetensors", POINTER.encode()), "git lfs pull"),
    "configuration a pointer": (with_file("config.json", POINTER.encode()), "git lfs pull"),
    "a shard missing": (index_of('{"weight_map": {"a": "model-1.safetensors"}}'),
                        "lacks model-1.safetensors"),
    "an index without map": (index_of("{}"), "no index"),
    "an index that leaves the folder": (index_of('{"weight_map": {"a": "../../secret"}}'),
                                        "lacks secret"),
    "a web page": (with_file("model.safetensors", b"<!DOCTYPE html><html>Log in"), "a web page"),
    "another format": (with_file("model.safetensors", b"GGUF\3\0\0\0" + bytes(90)), "GGUF"),
    "pickled code": (pickle_of({"a": Transformer}), "more than weights: dmc.Transformer;"),
    "pickled numbers": (pickle_of({"a": 1}), "not all of it is tensors: a .int"),
    "pickled tensors without names": (pickle_of({0: torch.zeros(1)}),
                                      "not all of it is tensors: 0 .Tensor"),
    "pickled weights among others": (pickle_of({"model": {"a": torch.ones(1)}, "step": 3}),
                                     "not all of it is tensors: model .dict., step .int.;"),
    "a pickled tensor": (pickle_of(torch.ones(3)), "holds a Tensor, not tensors by their names"),
    "old code": (pickle_of({"a": Transformer}, old=True), "more than weights: dmc.Transformer;"),
    "old numbers": (pickle_of({"a": 1}, old=True), "not all of it is tensors"),
    "old, cut off": (pickle_of({"a": torch.ones(99)}, old=True, cut=9), "truncated or damaged"),
    "pickled, cut off": (pickle_of({"a": torch.ones(99)}, cut=9), "truncated or damaged"),
    "an empty pickle": (instead("pytorch_model.bin", lambda path: path.touch()),
                        "truncated or damaged"),
    "no pickle": (instead("pytorch_model.bin", lambda path: path.write_bytes(b"x" * 99)),
                  "truncated or damaged"),
    "a pickle by Python": (instead("pytorch_model.bin", lambda path: path.write_bytes(
        pickle.dumps({"a": 1}, 2))), "or was not written by torch.save"),
    "a newer pickle by Python": (instead("pytorch_model.bin", lambda path: path.write_bytes(
        pickle.dumps({"a": 1}, 4))), "or was not written by torch.save .UnpicklingError: Unsupp"),
    "a program": (instead("pytorch_model.bin", program), "a TorchScript program"),
}


@pytest.mark.filterwarnings("ignore:.*TorchScript archive", "ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_unusable_checkpoints_are_refused_in_a_sentence(tmp_path, plain, capsys, case):
    damage, says = BAD_CHECKPOINTS[case]
    folder = shutil.copytree(plain, tmp_path / "model")
    damage(folder)
    with pytest.raises(InputError, match=says):
        load(folder)
    said = refusal(generate.main, ["--ckpt", str(folder), "--prompt", "x"], capsys, tmp_path)
    assert said.startswith("generate.py: ") and said.rstrip().endswith((".", ")"))


def odd_weights(folder):
    """Change each tensor's name to that without "model.", and add what old checkpoints have."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights = {name.removeprefix("model."): w for name, w in weights.items()}
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_index_beside(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "missing"}}')


ODD = {
    "a model without its prefix": odd_weights,
    "an index beside a single file": with_index_beside,
    "nulls": configured(rope_scaling=None, head_dim=8, quantization_config=None),
    "more entries": configured(pretraining_tp=2, foo=1, eos_token_id=[1, 2]),
    "a window that Llama does not know": configured(sliding_window=4),
    "a window as long as the context": configured(
        model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64),
    "swish": configured(hidden_act="swish"),
    "two names of a type": configured(
        rope_scaling={"type": "linear", "rope_type": "default", "factor": 2.0}),
    "two layouts": configured(
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama3 without its context": configured(rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "entries left out": lambda f: (rewrite(f, no_change), edit_json(f / "config.json", lambda c: [
        c.pop(name) for name in ("rms_norm_eps", "max_position_embeddings", "rope_theta",
                                 "rope_scaling", "tie_word_embeddings", "hidden_act")])),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_but_valid_folders_are_read_as_transformers_reads_them(tmp_path, plain, case):
    transformers = oracle("transformers")
    folder = shutil.copytree(plain, tmp_path / "model")
    ODD[case](folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(0, 257, (1, 60))
    with torch.no_grad():
        assert largest_error(load(folder)(tokens)[0], theirs(tokens).logits) < 1e-4


def peak_memory():
    """The most memory that this process has had, in bytes, with pages of mapped files. On Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("there is no /proc/self/status to read the peak memory from")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])


def damaged(content, reach, draw):
    """content, a bytearray, after up to four random changes to its first `reach` bytes."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(reach, len(content)) - 1))
        kind = draw(st.sampled_from(["set", "digit", "cut", "insert", "remove"]))
        if kind == "set":
            content[at] = draw(st.integers(0, 255))
        elif kind == "digit":                    # numbers are where the damage hides
            digits = [i for i in range(reach)
                      if i < len(content) and chr(content[i]).isdecimal()] or [at]
            content[draw(st.sampled_from(digits))] = draw(st.sampled_from(b"0123456789-eE."))
        elif kind == "cut":
            del content[max(1, at):]
            break
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=6))
        else:
            del content[at:at + draw(st.integers(1, 9))]
    return content


@pytest.mark.filterwarnings("ignore")
@given(st.data())
@settings(max_examples=80)
def test_corrupted_checkpoints_neither_crash_nor_hang_nor_allocate_wildly(tmp_path_factory, plain,
                                                                          data):
    """Random damage to one file: refused in one line, or harmless."""
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("corrupted") / "model")
    names = ["model.safetensors", "config.json", "tokenizer.json"]
    file = folder / data.draw(st.sampled_from(names))
    content = bytearray(file.read_bytes())
    reach = len(content)
    if file.suffix != ".json":
        reach = 8 + int.from_bytes(content[:8], "little") + 40
    file.write_bytes(damaged(content, reach, data.draw))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")          # forget the peak so far
    before, began = peak_memory(), time.monotonic()
    for read in (load, Tokenizer.from_folder):
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
        load(folder)
    with pytest.warns(UserWarning):
        said = refusal(generate.main, ["--ckpt", str(folder), "--prompt", "x"], capsys, tmp_path)
    assert "not numbers" in said


# ----------------------------------------------------------------------------------- finding models

def test_a_file_of_a_checkpoint_stands_for_its_folder(tmp_path, plain, capsys):
    folder = shutil.copytree(plain, tmp_path / "model")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert checkpoint.locate(str(folder / name)) == folder
    assert generate.main(["--ckpt", str(folder / "model.safetensors"), "--tokens", "2"]) == 0
    save(load(plain), tmp_path / "shards", shard_bytes=20_000)
    for file in (tmp_path / "shards").iterdir():
        assert checkpoint.locate(str(file)) == tmp_path / "shards"
    capsys.readouterr()
    torch.save({}, folder / "pytorch_model.bin")        # which `load` passes over for safetensors
    (tmp_path / "facts.json").write_text("{}")
    (folder / "notes.txt").touch()
    for file in (folder / "pytorch_model.bin", folder / "notes.txt", tmp_path / "facts.json"):
        said = refusal(generate.main, ["--ckpt", str(file)], capsys, tmp_path)
        assert "no file of the checkpoint" in said


def test_only_a_runs_own_names_are_read_as_compression_ratios(tmp_path, monkeypatch, plain):
    monkeypatch.chdir(tmp_path)
    for name in ("crystal-7b", "cr", "cr4-copy", "crinf", "crnan", "cr2", "cr4", "cr2.5", "cr."):
        shutil.copytree(plain, tmp_path / "runs/1" / name)
    (tmp_path / "runs/\N{SUPERSCRIPT TWO}").mkdir()               # a digit, but no number
    assert checkpoint.find_checkpoint("runs/1") == Path("runs/1/cr4")
    assert checkpoint.find_checkpoint(None) == Path("runs/1/cr4")
    shutil.copytree(plain, tmp_path / "runs/1/cr1e+06")
    assert checkpoint.find_checkpoint("runs/1") == Path("runs/1/cr1e+06")
    for name in ("cr2", "cr4", "cr2.5", "cr1e+06"):
        shutil.rmtree(tmp_path / "runs/1" / name)
    with pytest.raises(InputError, match="no finished run"):
        checkpoint.find_checkpoint(None)


# ------------------------------------------------------------------------- embeddings of any length

@pytest.fixture
def resized(tmp_path):
    """A function that writes a checkpoint over bytes with so many embeddings."""
    def write(rows, **changes):
        torch.manual_seed(1)
        model = Transformer(config_of((4, 2), vocab_size=rows, dmc=False, **changes))
        save(model, tmp_path / str(rows), Tokenizer.bytes())
        return str(tmp_path / str(rows))
    return write


@pytest.mark.parametrize("rows", [258, 1282, 70_000])
def test_there_may_be_any_number_of_embeddings_that_no_token_uses(resized, rows):
    folder = resized(rows)
    assert Tokenizer.from_folder(folder).stops == [256]
    assert generate.main(["--ckpt", folder, "--prompt", "a\u4e2d", "--tokens", "5"]) == 0


@pytest.mark.filterwarnings("ignore:.*texts have no end for it")
def test_there_may_be_fewer_embeddings_than_tokens(tmp_path, resized, capsys):
    """What is used counts: byte 0xe4 begins a text below, and the end of text has the id 256."""
    folder, prompts = resized(200), tmp_path / "prompts.jsonl"
    with pytest.warns(UserWarning, match=r"200 ids, and its end of text .* is 256"):
        tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos is None and tokenizer.stops == []
    assert tokenizer.encode("abc") == list(b"abc")
    for wrong in ("a\u4e2d", "a<|endoftext|>"):
        with pytest.raises(InputError, match=r"\((228|256)\), and the model has embeddings"):
            tokenizer.encode(wrong)
    assert generate.main(["--ckpt", folder, "--prompt", "abc", "--tokens", "5"]) == 0
    capsys.readouterr()
    assert "below 200 only" in refusal(
        generate.main, ["--ckpt", folder, "--prompt", "a\u4e2d"], capsys, tmp_path)
    prompts.write_text('{"prompt": "abc", "tokens": 3}\n{"prompt": "\\u4e2d", "tokens": 3}\n')
    out = tmp_path / "out.jsonl"
    assert generate.main(["--ckpt", folder, "--prompts", str(prompts), "--out", str(out)]) == 2
    good, bad = lines_of(out)
    assert good["finish"] == "length" and "below 200 only" in bad["error"]
    capsys.readouterr()
    run = ["--init", folder, *RETROFIT, "--out", str(tmp_path / "run")]
    (tmp_path / "other.txt").write_text("a\u4e2d" * 500)
    assert "below 200 only" in refusal(
        train.main, [*run, "--data", str(tmp_path / "other.txt")], capsys, tmp_path)


@pytest.mark.filterwarnings("ignore:.*texts have no end for it")
def test_training_takes_a_model_with_more_or_fewer_embeddings(resized, tmp_path, capsys):
    """Also where the text's tokens are on disk from a longer one with the same tokenizer."""
    data = tmp_path / "text.txt"
    data.write_text("0123456789 " * 200 + "{")
    for rows, result in ((5000, 0), (120, 2)):
        out = tmp_path / f"run-{rows}"
        run = ["--init", resized(rows), *RETROFIT, "--cr", "2", "--keep", "2"]
        assert train.main([*run, "--data", str(data), "--out", str(out)]) == result
        assert result or load(out / "cr2").config.vocab_size == rows
    assert "'{' (123)" in capsys.readouterr().err


def in_hub_cache(hub, plain, repo="meta-llama/Llama-2-7b-hf"):
    folder = hub / ("models--" + repo.replace("/", "--"))
    shutil.copytree(plain, folder / "snapshots/abc")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    return folder / "snapshots/abc"


@pytest.mark.parametrize("variable, below", [
    ("HF_HUB_CACHE", "."), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"),
    ("HOME", ".cache/huggingface/hub")])
def test_models_are_found_in_hugging_faces_cache(tmp_path, monkeypatch, plain, variable, below):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    expected = in_hub_cache(tmp_path / below, plain)
    for name in ("llama2-7b", "meta-llama/Llama-2-7b-hf"):
        assert checkpoint.locate(name) == expected
    assert checkpoint.locate(str(plain)) == plain


def test_models_that_are_not_there(tmp_path, monkeypatch, capsys, plain, text):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)          # as if it were missing
    monkeypatch.chdir(tmp_path)
    for main, flags in ((generate.main, ["--ckpt"]), (train.main, ["--data", text, "--init"])):
        said = refusal(main, [*flags, "llama2-13b"], capsys, tmp_path)
        assert "-m pip install huggingface_hub && " in said
        assert ("hf download meta-llama/Llama-2-13b-hf --include '*.json' '*.safetensors'") in said
        said = refusal(main, [*flags, "missing"], capsys, tmp_path)
        assert "no folder, and no model's name" in said
    snapshot_of = in_hub_cache(tmp_path / "hub", plain, "a/b")
    (snapshot_of / "model.safetensors").unlink()                        # half fetched
    said = refusal(generate.main, ["--ckpt", "a/b"], capsys, tmp_path)
    assert "hf download a/b" in said
    fetched = []
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(
        snapshot_download=lambda repo, allow_patterns: fetched.append(repo) or str(plain)))
    assert checkpoint.locate("a/b") == plain and fetched == ["a/b"]

    older, fetched = tmp_path / "older", []
    older.mkdir()

    def older_model(repo, allow_patterns):
        fetched.append(allow_patterns)
        if "pytorch_model*.bin" in allow_patterns:
            torch.save({}, older / "pytorch_model.bin")
        return str(older)

    monkeypatch.setitem(sys.modules, "huggingface_hub",
                        types.SimpleNamespace(snapshot_download=older_model))
    assert checkpoint.locate("a/b") == older and len(fetched) == 2
    assert checkpoint.weight_files(older) == [older / "pytorch_model.bin"]

    def fails(repo, allow_patterns):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "huggingface_hub",
                        types.SimpleNamespace(snapshot_download=fails))
    said = refusal(generate.main, ["--ckpt", "a/b"], capsys, tmp_path)
    assert "ConnectionError: no route" in said


@pytest.mark.parametrize("environment", ["env", "an env"])
def test_the_command_that_fetches_a_model_works_as_typed(tmp_path, monkeypatch, environment):
    """It installs into the interpreter that runs, also where that is not the one on PATH, and
    downloads with the command that it installs there."""
    called, binaries = tmp_path / "called", tmp_path / environment / "bin"
    binaries.mkdir(parents=True)
    (tmp_path / "a.json").touch()                                # which no pattern may become
    for name in ("python", "hf"):
        (binaries / name).write_text(
            f'#!/bin/sh\necho {name} "$@" >> {called}\n')
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr(sys, "executable", str(binaries / "python"))
    expected = ["python -m pip install huggingface_hub",
                "hf download meta-llama/Llama-2-7b-hf --include *.json *.safetensors"]
    for on_path in (False, True):
        if on_path:
            monkeypatch.setenv("PATH", str(binaries), prepend=os.pathsep)
        for folder in (tmp_path, tmp_path.parent, binaries):
            monkeypatch.chdir(folder)
            with pytest.raises(InputError) as refused:
                checkpoint.locate("llama2-7b")
            command = str(refused.value).partition("fetch it with: ")[2]
            subprocess.run(command, shell=True, check=True)
            assert called.read_text().splitlines() == expected
            called.unlink()


def test_random_weights(tmp_path, monkeypatch, tiny_shape, text, capsys):
    monkeypatch.chdir(tmp_path)
    model = checkpoint.random_model(shape("tiny"))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert torch.get_default_dtype() == torch.float32
    tiny = ["tiny", "--random-weights"]
    assert generate.main(["--ckpt", *tiny, "--prompt", "x", "--tokens", "5"]) == 0
    assert train.main(["--init", *tiny, "--data", text, *RETROFIT, "--out", "run"]) == 0
    assert load("run/cr3").config.vocab_size == 300
    capsys.readouterr()
    said = refusal(generate.main, ["--ckpt", "huge", "--random-weights"], capsys, tmp_path)
    assert "no shape" in said
    said = refusal(train.main, ["--random-weights", "--data", text], capsys, tmp_path)
    assert "--random-weights needs" in said


# ------------------------------------------------------------------- what a disk may do to a folder

@pytest.mark.parametrize("shard_bytes", [2000, 10 ** 9])
def test_the_same_model_gives_the_same_bytes(tmp_path, shard_bytes):
    model = Transformer(config_of())
    contents = []
    for name in ("a", "b", "c"):
        save(model, tmp_path / name, shard_bytes=shard_bytes, cr=2.0)
        files = sorted((tmp_path / name).iterdir())
        contents.append([(file.name, file.read_bytes()) for file in files])
        with safetensors.safe_open(next((tmp_path / name).glob("*.safetensors")), "pt") as f:
            assert list(f.metadata()) and f.metadata()["format"] == "pt"
    assert contents[0] == contents[1] == contents[2]


def test_weights_of_older_versions_are_read_and_have_no_checksum(tmp_path):
    model = Transformer(config_of())
    save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, metadata = weights.read_safetensors(file)
    tensors = {name: w.clone() for name, w in tensors.items()}
    safetensors.torch.save_file(tensors, file, {"config": metadata["config"], "format": "pt"})
    assert checkpoint_is(tmp_path, model)
    with pytest.raises(InputError, match="no checksum"):
        load(tmp_path, verified=True)


@given(st.integers(0, 10 ** 6), st.integers(1, 255), st.sampled_from([0, 1500]))
@settings(max_examples=40)
@pytest.mark.filterwarnings("ignore")
def test_verify_finds_any_flip_in_the_weights(tmp_path_factory, at, flip, shard_bytes):
    folder = tmp_path_factory.mktemp("flipped")
    save(Transformer(config_of()), folder, shard_bytes=shard_bytes or 10 ** 9)
    load(folder, verified=True)
    file = checkpoint.weight_files(folder)[-1]
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + at % (len(data) - header)] ^= flip
    file.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        checkpoint.verify(folder)


def test_verify_wants_the_config_that_was_saved_with_the_weights(tmp_path):
    save(Transformer(config_of()), tmp_path)
    checkpoint.verify(tmp_path)
    edit_json(tmp_path / "config.json", lambda facts: facts.update(eos_token_id=7))
    with pytest.raises(InputError, match="config.json is not what was saved with model"):
        checkpoint.verify(tmp_path)


def test_saving_removes_what_killed_saves_left_and_nothing_else(tmp_path):
    model = Transformer(config_of())
    save(model, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / ".model.safetensors.0a1b2c3d.partial").mkdir()
    (tmp_path / ".model.safetensors.0a1b2c3d.partial/model.safetensors").write_bytes(whole[:99])
    for name in (".tmpA1b2C3", ".tmpkeep", "model.safetensors.partial", "model-1-00001.partial"):
        (tmp_path / name).write_bytes(whole[:-5])
    (tmp_path / ".tmpabcdef").write_text("notes of somebody else, which are longer than 16 bytes")
    save(model, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        "model.safetensors", "config.json", ".tmpkeep", ".tmpabcdef", "model-1-00001.partial",
        "dmc.py", "modeling_dmc.py"}


@pytest.mark.parametrize("before, after", [(0, 2000), (2000, 0), (2000, 1500)])
def test_nothing_is_deleted_before_its_successor_is_on_the_disk(tmp_path, monkeypatch, before,
                                                                after):
    """After each move into a place, its folder is synced before anything is deleted."""
    save(Transformer(config_of()), tmp_path, shard_bytes=before or 10 ** 9)
    happened = []

    def noting(kind, change):
        def wrapped(*args, **kwargs):
            happened.append(kind(*args))
            return change(*args, **kwargs)
        return wrapped

    monkeypatch.setattr(Path, "replace", noting(lambda *_: "move", Path.replace))
    monkeypatch.setattr(Path, "unlink", noting(lambda *_, **__: "delete", Path.unlink))
    monkeypatch.setattr(files, "sync", noting(
        lambda path: "sync" if Path(path) == tmp_path else "content", files.sync))
    save(Transformer(config_of(n_layer=3)), tmp_path, shard_bytes=after or 10 ** 9)
    for i, event in enumerate(happened):
        if event == "move":
            assert happened[i - 1] == "content" and happened[i + 1] == "sync"
    assert "delete" in happened and happened.index("move") < happened.index("delete")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json",
                                  "tokenizer.json", "model.safetensors.index.json"])
def test_pipes_and_devices_are_refused_at_once(tmp_path, plain, name):
    folder = shutil.copytree(plain, tmp_path / "model")
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(InputError, match=rf"/{re.escape(name)} is a pipe or a device"):
            load(folder)
            Tokenizer.from_folder(folder)


UNUSUAL = {"sparse": lambda w: w.to_sparse(), "without data": lambda w: w.to("meta"),
           "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.filterwarnings("ignore")
def test_pickled_tensors_that_are_no_plain_ones_are_refused(tmp_path, plain, kind):
    folder = shutil.copytree(plain, tmp_path / "model")
    tensors, _ = weights.read_safetensors(folder / "model.safetensors")
    tensors["model.norm.weight"] = UNUSUAL[kind](tensors["model.norm.weight"].float())
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin") as refused:
        load(folder)
    assert str(refused.value).isprintable()


def test_names_from_files_command_no_terminal(tmp_path, plain):
    folder = shutil.copytree(plain, tmp_path / "model")
    tensors, _ = weights.read_safetensors(folder / "model.safetensors")
    tensors = {name: w.clone() for name, w in tensors.items()} | {"\x1b[2J\n": torch.zeros(2)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"unexpected: '\\x1b\[2J\\n'") as refused:
        load(folder)
    assert str(refused.value).isprintable()
