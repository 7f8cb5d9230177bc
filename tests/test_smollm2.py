"""What needs SmolLM2-135M, in the folder that DMC_SMOLLM2 names, or compares speed with
transformers. Measured figures go to DMC_RESULTS."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import dmc_fast
import generate
import train
from conftest import HERE, TEXTS, curve, largest_error, oracle
from dmc import Config, Transformer
from nanodmc import checkpoint, control_pair, first_decisions, sampling, text
from nanodmc.machine import slow_in_bf16
from nanodmc.parallel import control_rows
from nanodmc.settings import Settings
from nanodmc.tokenizer import Tokenizer
from test_tokenizer import assert_same_tokens

in_fp32 = partial(checkpoint.load, ops=dmc_fast, dtype=torch.float32)   # fast on every processor


def greedily(logits, position):
    return logits.argmax().item()


@torch.no_grad()
def test_smollm2_logits_equal_transformers(smollm2, smollm2_pair, english, measured):
    ours, theirs = smollm2_pair
    ids = Tokenizer.from_folder(smollm2).encode(english[:8000])[:1024]
    tokens = torch.tensor([ids])
    exact = theirs(tokens).logits
    error = largest_error(ours(tokens)[0], exact)
    measured["largest error of fp32 logits over 1,024 tokens, relative"] = error
    assert tokens.size(1) == 1024 and error < 1e-4
    half, some = type(theirs).from_pretrained(smollm2, dtype=torch.bfloat16), tokens[:, :256]
    both = checkpoint.load(smollm2)(some)[0], half(some).logits
    errors = [(logits.float() - exact[:, :256]).norm().item() for logits in both]
    measured["error of bf16 logits, in transformers' own"] = errors[0] / errors[1]
    assert errors[0] < 1.2 * errors[1]


@torch.no_grad()
def test_smollm2_greedy_generation_equals_transformers(smollm2, smollm2_pair, english):
    ours, theirs = smollm2_pair
    for prompt in (english[:600], "The capital of France is"):
        ids = Tokenizer.from_folder(smollm2).encode(prompt)
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=100, do_sample=False,
                                   eos_token_id=None, pad_token_id=0)
        cache = ours.Cache(ours.config, 1)
        greedy = sampling.generate(ours, cache, ids, 100, greedily)
        assert list(greedy) == expected[0, len(ids):].tolist()


@pytest.fixture(scope="session")
def smollm2_tokenizers(smollm2):
    theirs = oracle("tokenizers").Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    return Tokenizer.from_folder(smollm2), theirs


def test_smollm2_tokens_equal_the_tokenizers_library(smollm2_tokenizers, english, measured):
    ours, theirs = smollm2_tokenizers
    began = time.perf_counter()
    ours.encode(english)
    then = time.perf_counter()
    theirs.encode(english)
    ratio = (then - began) / (time.perf_counter() - then)
    measured["encoding 1.8 MB, ours / tokenizers' seconds"] = ratio
    theirs.encode_special_tokens = False
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    planes = [everything[i:i + 65536] for i in range(0, len(everything), 65536)]
    sources = [Path(f).read_text(encoding="utf-8", errors="ignore")
               for f in text.standard_library()]
    spaced = [" ".join(plane[:3000]) for plane in planes]
    for given_text in [english[:2_000_000], *planes, *spaced, *sources]:
        ids = theirs.encode(given_text).ids
        assert ours.encode(given_text) == ids
        if theirs.decode(ids) == given_text:
            assert ours.decode(ids) == given_text


@given(text=TEXTS)
@settings(max_examples=300)
def test_smollm2_tokens_of_awkward_texts(smollm2_tokenizers, text):
    other = text.replace("<s>", "<|im_start|>").replace("the", "\x04").replace("\n", "\U00050000")
    for awkward in (text, other):
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
    """Seconds of a prefill of 512 tokens, and of a token after it: the best of ten turns each,
    since noise only adds."""
    if dtype == torch.bfloat16 and slow_in_bf16("cpu") and "DMC_RESULTS" not in os.environ:
        pytest.skip("a processor that is slow in bf16 takes minutes for this")
    ours = checkpoint.load(smollm2, dmc_fast, dtype=dtype)
    theirs = oracle("transformers").LlamaForCausalLM.from_pretrained(smollm2, dtype=dtype).eval()
    ids = Tokenizer.from_folder(smollm2).encode(english[:8000])[:512]
    clock, seconds = Clock(), {"ours": [], "theirs": []}
    for _ in range(10):
        clock.times = [time.perf_counter()]
        cache = ours.Cache(ours.config, 1, None, dtype)
        for _ in sampling.generate(ours, cache, ids, 20, greedily):
            clock.put(None)
        seconds["ours"].append(np.diff(clock.times))
        clock.times, began = [], time.perf_counter()
        theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None,
                        pad_token_id=0, streamer=clock)
        seconds["theirs"].append(np.diff([began, *clock.times[1:]]))   # it shows the prompt first
    ratio = {}
    for name, part in (("prefill of 512 tokens", np.s_[:, 0]), ("decoding", np.s_[:, 1:])):
        best = {who: np.min(np.array(times)[part]) for who, times in seconds.items()}
        ratio[name] = best["ours"] / best["theirs"]
        measured[f"{name} in {dtype}, ours / transformers' seconds"] = ratio[name]
        measured[f"{name} in {dtype}, ms"] = 1e3 * best["ours"]
    assert max(ratio.values()) < 1.25    # about equal; results/smollm2.json is of an idle machine


def test_smollm2_knows_the_capital_of_france(smollm2, capsys):
    arguments = ["--ckpt", str(smollm2), "--prompt", "The capital of France is", "--tokens", "12"]
    assert generate.main(arguments) == 0
    assert "The capital of France is Paris" in capsys.readouterr().out


@torch.no_grad()
def test_smollm2_hardly_misses_the_channels_that_are_chosen(smollm2, english, measured):
    """What freeing a channel costs without any training, as the KL divergence to the model given:
    channel 0 as it is, and that of the pair that `choose` takes."""
    tokenizer = Tokenizer.from_folder(smollm2)
    documents = [tokenizer.encode(part)[:512] for part in english.split("\f") if len(part) > 3000]
    texts, chosen_by = (torch.tensor(documents[a:b]) for a, b in ((0, 8), (8, 24)))
    plain = in_fp32(smollm2, dmc=False)

    def scores(model, gain):
        hidden = (model.hidden(x, gain=gain)[0] for x in texts.split(4))
        return torch.cat([model.lm_head(x).float().log_softmax(-1) for x in hidden])

    def divergence(choice):
        pair = choice.pair if choice else 0
        model = in_fp32(smollm2, dmc=True, control_pair=pair)
        if choice:
            control_pair.apply(choice, model)
        return (expected.exp() * (expected - scores(model, 0.0))).sum(-1).mean().item()
    expected = scores(plain, 1.0)
    choice = control_pair.choose(plain, list(chosen_by.split(1)))
    figures = {"as it is": divergence(None), f"pair {choice.pair}, chosen": divergence(choice)}
    measured["nats per token that freeing channel 0 costs, untrained"] = figures
    assert figures[f"pair {choice.pair}, chosen"] < 0.1 * figures["as it is"]


@pytest.fixture
def freed(smollm2, english):
    """SmolLM2 freed of the chosen channel, and pieces of 512 tokens (1, T)."""
    ids = Tokenizer.from_folder(smollm2).encode(english[:600_000])
    pieces = list(torch.tensor(ids[:len(ids) // 512 * 512]).view(-1, 1, 512))
    plain = in_fp32(smollm2, dmc=False)
    choice = control_pair.choose(plain, pieces[-16:])
    model = in_fp32(smollm2, dmc=True, c=3.0, control_pair=choice.pair)
    control_pair.apply(choice, model)
    with torch.no_grad():
        for row in control_rows(model):
            row.zero_()
    return model, pieces


def test_smollm2_fitted_decisions_cost_less_than_others(freed, smollm2, monkeypatch, measured):
    """As the KL divergence to the model given at some CR, before any training."""
    model, pieces = freed
    few = "DMC_RESULTS" not in os.environ
    texts, pieces = torch.cat(pieces[:4 if few else 8]).split(4), pieces[8:]
    plain = in_fp32(smollm2, dmc=False)
    with torch.no_grad():
        expected = [plain(x)[0].log_softmax(-1) for x in texts]

    @torch.no_grad()
    def figures():
        kl, slots = [], []
        for x, p in zip(texts, expected, strict=True):
            logits, alpha = model(x)
            kl.append((p.exp() * (p - logits.log_softmax(-1))).sum(-1).mean())
            slots.append(1 - alpha.mean())
        return {"cr": 1 / torch.stack(slots).mean().item(), "kl": torch.stack(kl).mean().item()}

    sizes = [2 ** 12] if few else [2 ** 13, 2 ** 15]
    seen = [first_decisions.measure(model, x) for x in pieces[:sizes[-1] // 512]]
    monkeypatch.setattr(first_decisions, "measure", lambda model, x: x)
    found = {}
    for size in sizes:
        first_decisions.apply(first_decisions.fit(model, seen[:size // 512]), model)
        found[f"fitted on {size:,} tokens"] = figures()
    last = found[f"fitted on {sizes[-1]:,} tokens"]
    rate = 1 - 1 / last["cr"]

    def at_random(q, k, config, noise, position):
        alpha = (torch.rand(k[..., 0].shape) < rate).float()
        alpha[..., 0] = 0
        return alpha, torch.where(alpha > 0, -torch.inf, 0.0), torch.ones_like(alpha)

    torch.manual_seed(0)
    for layer in model.layers:
        layer.self_attn.decide = at_random
    found["as often, at random"] = figures()
    measured["nats per token that merging costs, untrained"] = found
    assert found["as often, at random"]["cr"] == pytest.approx(last["cr"], rel=0.02)
    assert last["cr"] > 1.15 and last["kl"] < 0.5 * found["as often, at random"]["kl"]


def test_smollm2_is_retrofitted(smollm2, smollm2_pair, english, tmp_path, capsys):
    """All phases for a few steps; the loss at step 0 is the model's own, as in transformers."""
    (tmp_path / "text").write_text(english[:200_000])
    steps = ["--free-steps", "2", "--retrofit-steps", "2", "--solidify-steps", "1", "--cr", "2",
             "--eval-sequences", "2"]
    assert train.main(["--init", str(smollm2), "--data", str(tmp_path / "text"), *steps,
                       "--context", "64", "--batch", "2", "--lr", "3e-5", "--precision", "fp32",
                       "--out", str(tmp_path / "run")]) == 0
    s = Settings(**json.loads((tmp_path / "run/run.json").read_text())["settings"])
    x, y = text.batch(text.load_data(s, smollm2)[0], s, 0, "cpu")
    with torch.no_grad():
        logits = smollm2_pair[1](x).logits
    expected = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    first = curve(tmp_path / "run")[0]
    assert first["phase"] == "free" and first["loss"] == pytest.approx(expected, abs=1e-4)
    shutil.rmtree(tmp_path / "run")


LOADING = """
import sys, torch
from nanodmc.checkpoint import load
from test_checkpoint import peak_memory
torch.zeros(1) + 1
before = peak_memory()
model = load(sys.argv[1])
size = sum(p.nbytes for p in model.parameters())
assert all(p.max().isfinite() for p in model.parameters())         # every weight is in memory now
print(size, peak_memory() - before)
"""


def test_loading_takes_no_more_memory_than_the_weights_smollm2(tmp_path, smollm2, measured):
    """On 2 GB in bf16, in shards and in one file: below 1.15 times the weights."""
    config = Config(vocab_size=32000, n_layer=18, n_head=16, n_kv_head=16, dim=2048, ffn_dim=5504,
                    max_seq_len=2048, dmc=False)
    torch.set_default_dtype(torch.bfloat16)
    model = Transformer(config)
    torch.set_default_dtype(torch.float32)
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE / 'tests'}"}
    for shard_bytes in (10 ** 9, 5 * 10 ** 9):
        checkpoint.save(model, tmp_path, shard_bytes=shard_bytes)
        loading = subprocess.run([sys.executable, "-c", LOADING, tmp_path], cwd=HERE,
                                 env=environment, capture_output=True, check=True)
        size, peak = map(int, loading.stdout.split())
        files = len(checkpoint.weight_files(tmp_path))
        name = f"peak memory of loading {size / 1e9:.2f} GB in {files} files, in weights"
        measured[name] = peak / size
        assert size > 2e9 and peak < 1.15 * size
    shutil.rmtree(tmp_path)
