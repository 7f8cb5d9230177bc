"""Properties of train.py: the command, its steps, and what it makes of a model that is given."""

import contextlib
import copy
import gc
import json
import math
import shutil
import weakref
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import generate
import train
from conftest import (
    HERE,
    LEAN,
    POINTER,
    RETROFIT,
    SHORT,
    TINY,
    PowerCut,
    before_step,
    curve,
    dies,
    refusal,
    single_threaded,
    snapshot,
    summary,
)
from dmc import Transformer
from nanodmc import first_decisions, optim, settings, starts
from nanodmc.checkpoint import load
from nanodmc.parallel import control_rows
from nanodmc.phases import plan
from nanodmc.settings import Settings, new_settings
from nanodmc.tables import heat_map, table
from nanodmc.text import batch, load_data

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny models

# ------------------------------------------------------------------------------------- from nothing

def test_a_run_yields_its_models_and_its_table(finished, capsys):
    result = json.loads((finished / "summary.json").read_text())
    assert [entry["target"] for entry in result["dmc"]] == [2, 3]
    for entry in result["dmc"]:
        assert 1 <= entry["cr"] <= 16 and math.isfinite(entry["loss"]) and len(entry["heads"]) == 1
    assert result["seconds"] > 0 and result["versions"]["torch"] == torch.__version__
    entries = curve(finished)
    steps = {"pretrain": 6, "free": 3, "retrofit": 5, "solidify": 6 + 3, "control": 11}
    assert {name: sum(e["phase"] == name for e in entries) for name in steps} == steps
    targets = [e["target_cr"] for e in entries if e["phase"] == "retrofit"]
    assert targets == pytest.approx([1.4, 1.8, 2.2, 2.6, 3.0])
    assert train.main(["--out", str(finished), "--resume"]) == 0     # shows its table again
    shown = capsys.readouterr().out
    assert "DMC 3x" in shown and "head 0" in shown and "control" in shown
    assert not any(row.any() for row in control_rows(load(finished / "freed")))
    assert any(row.any() for row in control_rows(load(finished / "cr3")))
    assert not load(finished / "control").config.dmc and load(finished / "cr2").config.dmc


def test_every_track_of_a_run_reads_the_same_data(tmp_path, text, monkeypatch):
    positions, real = [], train.batch

    def read(tokens, s, position, device, rows):
        positions.append(position)
        return real(tokens, s, position, device, rows)

    monkeypatch.setattr(train, "batch", read)
    assert train.main(["--out", str(tmp_path / "run"), "--data", text, *TINY]) == 0
    assert positions[:14] == list(range(14))                     # pretrain, free, retrofit
    assert positions[14:20] == list(range(11, 17))               # from CR 2, after step 2 of 5
    assert positions[20:23] == [14, 15, 16] and positions[23:] == list(range(6, 17))


def test_the_last_step_of_solidify_decides_as_in_use():
    """With a trace of noise left: on average over all tokens, no decision is in between."""
    s = Settings(layers=1, heads=4, kv_heads=2, dim=16, ffn_dim=16, context=16, cr=2.0, c=0.0,
                 final_noise=1e-6)
    torch.manual_seed(0)
    model = Transformer(replace(s.small_config(), **s.method(dmc=True)))
    x = torch.randint(0, 257, (2, 17))
    with torch.no_grad():
        in_use = 1 / (1 - model(x[:, :-1])[1]).mean().item()
    for step, same in ((s.solidify_steps - 1, True), (0, False)):
        trained = copy.deepcopy(model)
        figures = train.train_step(trained, optim.new_optimizer(trained, s), plan(s)[3], step,
                                   [(1, x[:, :-1], x[:, 1:])], s)
        assert (abs(figures.cr - in_use) < 1e-4) == same


def test_control_rows_take_larger_steps_and_nothing_else_does():
    s = Settings(layers=1, heads=4, kv_heads=2, dim=16, ffn_dim=16, context=16,
                 channel_lr_factor=10.0)
    phase = plan(s)[2]
    moved = []
    for factor in (1.0, 10.0):
        torch.manual_seed(0)
        model = Transformer(replace(s.small_config(), **s.method(dmc=True)))
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = optim.new_optimizer(model, s)
        x = torch.randint(0, 257, (2, 17))
        changed = Settings(**{**asdict(s), "channel_lr_factor": factor})
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


def test_the_model_chooses_the_preset(plain, monkeypatch):
    """One that is given implies the paper's settings in a short schedule, and its own positions."""
    for arguments, expected in {
            "": (1e-3, 8, 128, [2, 3, 4]),
            "--init llama2-70b": (1.5e-5, 1024, 4096, [2, 3, 4]),
            f"--init {plain}": (3e-5, 64, 64, [2, 3]),
            f"--init {plain} --context 32": (3e-5, 64, 32, [2, 3]),
            f"--init {plain} --preset laptop": (1e-3, 8, 64, [2, 3, 4]),
            f"--init {plain} --preset few-tokens": (2e-4, 4, 64, [2, 3, 4]),
            "--init llama2-7b --preset few-tokens --keep 2,4": (2e-4, 4, 512, [2, 4])}.items():
        given, options = train.parse(arguments.split())
        s = new_settings(given, options.preset)
        assert (s.lr, s.batch, s.context, s.kept()) == expected
    monkeypatch.setattr(settings, "slow_in_bf16", lambda device: False)     # on any machine
    s = new_settings({"init": str(plain)})
    assert (s.tau, s.c, s.cr_weight, s.channel_lr_factor) == (0.1, 5, 1, 1)
    assert (s.precision, s.free_steps, s.retrofit_steps, s.solidify_steps) == ("bf16", 50, 400, 150)


def test_the_plan_is_printed_once_all_was_checked(tmp_path, monkeypatch, plain, text, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("short.txt").write_text("x" * 200)
    for arguments, says in ((["--init", str(plain)], "add --data"),
                            (["--init", "llama2-7b"], "add --data"),
                            (["--data", "missing.txt"], "missing.txt"),
                            (["--data", "short.txt"], "smaller --context"),
                            (["--data", text, "--out", "file/run"], "file is no folder")):
        assert says in refusal(train.main, arguments, capsys, tmp_path)
        assert train.main(arguments) == 2 and not capsys.readouterr().out


def test_speed_is_measured(tiny_shape, tmp_path, capsys):
    arguments = ["--init", "tiny", "--bench", "4", *LEAN, "--batch", "2", "--context", "16"]
    with single_threaded():
        assert train.main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    for name in ("plain", "dmc"):
        speed, seconds = found[name]["tokens_per_second"], found[name]["seconds_per_step"]
        assert speed * seconds == pytest.approx(2 * 16) and 4 < found[name]["loss"] < 7
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    told = refusal(train.main, [*arguments[:2], "--bench", "2"], capsys, tmp_path)
    assert "--bench needs" in told


def test_a_retrofit_that_failed_is_compared_at_its_target(tmp_path, plain, text, capsys):
    """Decisions that never merge: CR 1, beside averaging at the CR that was aimed at."""
    arguments = ["--init", str(plain), "--data", text, *RETROFIT, "--c", "200"]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: DMC 3x missed its target: CR 1.00 was reached" in shown
    assert "every 3 tokens averaged 3.00" in shown and "every 1 tokens" not in shown
    for entry in summary(tmp_path / "run")["dmc"]:
        assert entry["cr"] == 1 and entry["pooling"] != pytest.approx(entry["loss"], abs=1e-4)


def test_readme_quotes_what_was_measured():
    readme = (HERE / "README.md").read_text()
    measured = json.loads((HERE / "results/laptop.json").read_text())
    assert table(measured).strip() in readme
    assert heat_map(measured["dmc"][-1]["heads"]).strip() in readme
    for field in fields(Settings):         # measured with the defaults that the code has now
        # a setting that is newer than the figures leaves by default everything as it was
        assert measured["settings"].get(field.name, field.default) == field.default


def test_readme_has_the_ranges_over_seeds_and_machines():
    """Each row of its table of results, from all files of the laptop run."""
    readme = (HERE / "README.md").read_text()
    runs = [json.loads(path.read_text()) for path in HERE.glob("results/laptop*.json")]
    assert len(runs) == 3
    for i in range(3):
        found = [(run["dmc"][i], run["control"]) for run in runs]
        crs = [entry["cr"] for entry, _ in found]
        losses = [entry["loss"] - control for entry, control in found]
        pooled = [entry["pooling"] - control for entry, control in found]
        row = (f"| {min(crs):.2f} to {max(crs):.2f} | {min(losses):+.3f} to {max(losses):+.3f} "
               f"| {min(pooled):+.2f} to {max(pooled):+.2f} |")
        assert row in readme, row


# ---------------------------------------------------------------------- what a phase leaves behind

@pytest.fixture
def alive(monkeypatch):
    """What training holds, by weak references that are filled as it goes: the models, the states.

    The garbage collector is off, so that only what is released by design is gone. All parts are
    compiled, as on a GPU.
    """
    held = {"models": [], "states": []}
    still = lambda kind: [x() for x in held[kind] if x() is not None]

    def ready(*args, real=train.ready):
        assert not still("models") and not still("states")          # of the phase before
        model = real(*args)
        optim.compile_parts(model, backend="eager")
        held["models"] += map(weakref.ref, (*model.modules(), *model.parameters()))
        return model

    def new_optimizer(*args, real=train.new_optimizer):
        optimizer = real(*args)
        moments = [x for state in optimizer.state.values() for x in state.values()]
        tensors = moments + list(getattr(optimizer, "sums", {}).values())
        held["states"] += map(weakref.ref, (optimizer, *tensors))
        return optimizer

    def evaluate(model, *args, real=train.evaluate):
        assert not still("states") and all(p.grad is None for p in model.parameters())
        return real(model, *args)

    for f in (ready, new_optimizer, evaluate):
        monkeypatch.setattr(train, f.__name__, f)
    monkeypatch.setattr(starts, "ready", ready)
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    gc.disable()
    yield held, still
    gc.enable()


@pytest.mark.parametrize("flags", [[], LEAN, ["--precision", "bf16"],
                                   ["--choose-pair", "--fit-decisions"]])
def test_a_phase_releases_what_it_held(tmp_path, text, alive, monkeypatch, flags):
    """Weights, gradients, their sums and moments are gone before the next phase builds its own."""
    held, still = alive
    monkeypatch.setattr(first_decisions, "TOKENS", 512)
    out = ["--out", str(tmp_path / "run"), "--data", text]
    assert train.main([*out, *TINY, *SHORT, *flags]) == 0
    assert len(held["models"]) > 6 * 10 and len(held["states"]) > 5 * 10
    assert not still("models") and not still("states")


def test_the_bench_releases_its_first_model(tmp_path, tiny_shape, alive):
    held, still = alive
    arguments = ["--init", "tiny", "--bench", "4", *LEAN, "--batch", "2", "--context", "16"]
    assert train.main([*arguments, "--out", str(tmp_path)]) == 0
    assert held["models"] and held["states"] and not still("models") and not still("states")


# ---------------------------------------------------------------------------------------- bad input

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
    "infinite memory": ["--memory", "inf"],
    "memory that is no number": ["--memory", "nan"],
    "no memory": ["--memory", "0"],
    "more steps than anybody has": ["--pretrain-steps", "1" + "0" * 300],
    "a seed beyond PyTorch's": ["--seed", str(2 ** 64)],
    "a weight beyond any": ["--cr-weight", "1e300"],
    "redo without resume": ["--redo"],
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


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_train_refuses(case, messy_folder, capsys, text):
    given_data = [] if "--data" in BAD_TRAIN[case] else ["--data", text]
    context = ["--context", "16"] if "--data" in BAD_TRAIN[case] else []
    told = refusal(train.main, [*given_data, *context, *BAD_TRAIN[case]], capsys, messy_folder)
    assert told.startswith("train.py: ")


# ------------------------------------------------------------------------------------ a given model

def own_loss(model, s, tokens):
    x, y = batch(tokens, s, 0, "cpu")
    return F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item()


def test_a_given_model_is_retrofitted(tmp_path, plain, text, capsys, monkeypatch):
    out, before = tmp_path / "run", snapshot(plain)
    monkeypatch.chdir(plain.parent)
    arguments = ["--init", plain.name, "--data", text, *RETROFIT, "--out", str(out)]
    arguments += ["--precision", "fp32"]
    assert train.main(arguments) == 0
    monkeypatch.chdir(tmp_path)                      # and what follows works from anywhere
    shown = capsys.readouterr().out
    assert "nats/token" in shown and "to pretrained" not in shown and "to control" not in shown
    cr = summary(out)["dmc"][0]["cr"]
    assert f"at CR {cr:.2f} (target 2) -> cr2" in shown
    assert snapshot(plain) == before
    steps = curve(out)
    assert [s["phase"] for s in steps] == ["free"] * 3 + ["retrofit"] * 5 + ["solidify"] * 6
    s = Settings(**json.loads((out / "run.json").read_text())["settings"])
    given = load(plain)
    assert steps[0]["loss"] == pytest.approx(own_loss(given, s, load_data(s, plain)[0]))
    assert not (out / "pretrained/model.safetensors").exists()           # measured, not copied
    made = load(out / "cr3")
    assert made.config == replace(given.config, **s.method(dmc=True))
    tokenizers = [(folder / "tokenizer.json").read_bytes() for folder in (out / "cr3", plain)]
    assert tokenizers[0] == tokenizers[1]
    section = json.loads((out / "cr3/config.json").read_text())["dmc"]
    assert section["phase"] == "solidify" and section["target_cr"] == 3 and section["cr"] > 1
    assert generate.main(["--ckpt", str(out), "--prompt", "3 times", "--tokens", "4"]) == 0
    assert train.main(["--resume", "--out", str(out)]) == 0


def test_a_given_model_with_a_control_and_a_kill(tmp_path, plain, text):
    curves = []
    for name, dies_at in (("whole", None), ("killed", 9)):
        arguments = ["--out", str(tmp_path / name)]
        with before_step(dies_at, dies), contextlib.suppress(PowerCut):
            train.main([*arguments, "--init", str(plain), "--control", "--data", text, *RETROFIT])
        assert train.main([*arguments, "--resume"]) == 0
        curves.append(curve(tmp_path / name))
    assert curves[0] == curves[1] and "control" in summary(tmp_path / "whole")


def test_solidify_starts_from_any_kept_model_also_later(tmp_path, plain, text, capsys):
    for name, chosen in (("at once", "3,2"), ("later", "3")):
        arguments = ["--init", str(plain), "--data", text, *RETROFIT, "--solidify", chosen]
        assert train.main([*arguments, "--out", str(tmp_path / name)]) == 0
    at_once, later = tmp_path / "at once", tmp_path / "later"
    assert (later / "retrofit-2").exists() and not (later / "cr2").exists()
    assert [entry["target"] for entry in summary(later)["dmc"]] == [3]
    capsys.readouterr()
    resume = ["--resume", "--out", str(later), "--solidify"]
    assert "behind those" in refusal(train.main, [*resume, "2,3"], capsys, tmp_path)
    assert train.main([*resume, "3,2"]) == 0
    assert curve(later) == curve(at_once) and summary(later)["dmc"] == summary(at_once)["dmc"]


BAD_INIT = {
    "a size of the small model": (["--layers", "2"], "--layers is for the small model"),
    "steps of pretraining": (["--pretrain-steps", "5"],
                             "--pretrain-steps is for the small model"),
    "more context than positions": (["--context", "65"], "more than the model's 64 positions"),
    "compressed already": (["--init", "cr3"], "is a DMC model already"),
    "no tokenizer": (["--init", "mute"], "holds no tokenizer.json"),
    "a pointer for a tokenizer": (["--init", "pointer"], "git lfs pull"),
}


@pytest.mark.parametrize("case", BAD_INIT)
def test_train_refuses_a_given_model(tmp_path, monkeypatch, plain, finished, text, capsys, case):
    arguments, says = BAD_INIT[case]
    for name in ("plain", "mute", "pointer"):
        shutil.copytree(plain, tmp_path / name)
    shutil.copytree(finished / "cr3", tmp_path / "cr3")
    (tmp_path / "mute/tokenizer.json").unlink()
    (tmp_path / "pointer/tokenizer.json").write_text(POINTER)
    monkeypatch.chdir(tmp_path)
    given = [] if "--init" in arguments else ["--init", "plain"]
    arguments = [*given, "--data", text, "--context", "16", *arguments]
    assert says in refusal(train.main, arguments, capsys, tmp_path)
