"""The precision that a machine is fast in, and what training and generation make of it."""

import time

import pytest
import torch

import dmc
import generate
import train
from conftest import TINY, refusal, single_threaded
from nanodmc import checkpoint, machine, runs, settings
from nanodmc.tokenizer import Tokenizer
from test_dmc import config_of

slow = pytest.mark.parametrize("slow", [True, False])


@pytest.fixture
def bf16(tmp_path):
    """The folder of a tiny model whose embedding is its output matrix, stored in bf16."""
    torch.manual_seed(0)
    model = dmc.Transformer(config_of(dmc=True, tie_embeddings=True, vocab_size=257)).bfloat16()
    checkpoint.save(model, tmp_path / "bf16", Tokenizer.bytes())
    return tmp_path / "bf16"


def make_slow(monkeypatch, answer=True, free=10 ** 9):
    for module in machine, settings, runs:
        monkeypatch.setattr(module, "slow_in_bf16", lambda device: answer)
    monkeypatch.setattr(machine, "free_memory", lambda device: free)


def seconds(dtype):
    """The least that a product of two matrices takes on the CPU, of one thread's own time."""
    x, y, taken = torch.randn(256, 256).to(dtype), torch.randn(256, 256).to(dtype), []
    with single_threaded():
        for _ in range(20):
            began = time.thread_time()
            x @ y
            taken.append(time.thread_time() - began)
    return min(taken)


def test_slow_is_what_the_clock_calls_slow():
    assert machine.slow_in_bf16("cpu") == (seconds(torch.bfloat16) > 3 * seconds(torch.float32))
    assert not machine.slow_in_bf16("cuda:0")


@slow
def test_a_model_in_bf16_becomes_fp32_where_that_is_faster(bf16, slow, monkeypatch):
    make_slow(monkeypatch, slow)
    stored, model = checkpoint.load(bf16), machine.fast_model(checkpoint.load(bf16))
    assert model.lm_head.weight is model.embed_tokens.weight
    for (name, w), p in zip(stored.named_parameters(), model.parameters(), strict=True):
        assert p.dtype == (torch.float32 if slow else torch.bfloat16), name
        assert torch.equal(w.float(), p.float()), name


def test_a_model_that_memory_holds_only_in_bf16_stays_so(bf16, monkeypatch):
    model = checkpoint.load(bf16)
    make_slow(monkeypatch, free=4 * sum(p.numel() for p in model.parameters()))
    with pytest.warns(UserWarning, match="slow in half precision"):
        assert machine.fast_model(model).lm_head.weight.dtype == torch.bfloat16


def test_results_of_one_file_are_of_one_dtype(bf16, tmp_path, monkeypatch, capsys):
    """A file that was begun on a processor that is slow in bf16, and continued on another."""
    prompts = tmp_path / "prompts"
    prompts.write_text('{"prompt": "3"}\n')
    command = ["--ckpt", str(bf16), "--prompts", str(prompts), "--out", str(tmp_path / "results"),
               "--tokens", "2", "--cache-gb", "1e-4"]
    make_slow(monkeypatch)
    assert generate.main(command) == 0
    make_slow(monkeypatch, False)
    said = refusal(generate.main, command, capsys, tmp_path)
    assert 'another dtype ("float32", now "bfloat16"), as of line 1' in said


def test_other_dtypes_stay_as_they_are(monkeypatch):
    make_slow(monkeypatch)
    for dtype in torch.float32, torch.float64:
        model = dmc.Transformer(config_of()).to(dtype)
        assert machine.fast_model(model) is model and model.lm_head.weight.dtype == dtype


def test_generation_takes_what_is_faster(bf16, tmp_path, capsys, monkeypatch):
    """The text is that of the same weights stored in fp32."""
    make_slow(monkeypatch)
    checkpoint.save(checkpoint.load(bf16).float(), tmp_path / "fp32", Tokenizer.bytes())
    texts = []
    for folder in bf16, tmp_path / "fp32":
        assert generate.main(["--ckpt", str(folder), "--prompt", "abc", "--tokens", "20"]) == 0
        texts.append(capsys.readouterr().out.partition("\n")[2])
    assert texts[0] == texts[1] and "bytes" in texts[0]


@slow
def test_presets_train_in_what_is_faster_unless_told(slow, monkeypatch):
    make_slow(monkeypatch, slow)
    for preset in settings.PRESETS:
        paper = "fp32" if slow or preset == "laptop" else "bf16"
        given = {} if preset == "laptop" else {"init": "llama2-7b", "random_weights": True}
        assert settings.new_settings(given, preset).precision == paper
        given["precision"] = "bf16"
        assert settings.new_settings(given, preset).precision == "bf16"


@slow
def test_a_run_in_bf16_says_so_where_that_is_slow(slow, text, tmp_path, capsys, monkeypatch):
    make_slow(monkeypatch, slow)
    arguments = ["--out", str(tmp_path / "run"), "--data", text, *TINY]
    assert train.main([*arguments, "--precision", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert "parameters in bf16" in printed and ("several times slower" in printed) == slow
