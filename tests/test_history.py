"""What nanodmc/history.py tells of a run, against the run's own files."""

import json
import shutil

import numpy as np
import pytest

from nanodmc.files import InputError
from nanodmc.history import POINTS, WIDTH, history, phase_of
from nanodmc.resumed import read_run
from nanodmc.settings import Settings

settings_of = lambda run: read_run(run)["settings"]


def test_the_history_is_that_of_the_run(finished):
    told = json.loads(json.dumps(history(finished, settings_of(finished))))
    s = Settings(**told["settings"])
    assert s == settings_of(finished)
    entries = list(map(json.loads, (finished / "metrics.jsonl").read_text().splitlines()))
    assert sum(phase["steps"] for phase in told["phases"]) == len(entries)
    assert [phase["phase"] for phase in told["phases"]] == [
        "pretrain", "free", "retrofit", "solidify", "solidify", "control"]
    for index, phase in enumerate(told["phases"]):
        mine = [e for e in entries if e["index"] == index]
        assert phase["tokens"] == len(mine) * s.batch * s.context
        assert phase["target_cr"] == mine[-1]["target_cr"]
        first = phase["curve"][0]
        assert first["loss"] == pytest.approx(np.mean([e["loss"] for e in mine[:WIDTH]]), abs=1e-4)
        assert ("cr" in first) == (phase["phase"] in ("retrofit", "solidify"))
    assert told["models"].keys() == {"pretrained", "freed", "cr2", "cr3", "control"}
    summary = json.loads((finished / "summary.json").read_text())
    assert told["models"]["control"]["loss"] == summary["control"]
    assert told["finished"]["device"] == summary["device"]


def test_a_run_that_is_not_finished(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open() as file:
        lines = file.readlines()[:8]
    (run / "metrics.jsonl").write_text("".join(lines))
    told = history(run, settings_of(run))
    assert told["finished"] is None
    assert [phase["steps"] for phase in told["phases"]] == [6, 2]
    (run / "metrics.jsonl").unlink()
    assert history(run, settings_of(run))["phases"] == []


@pytest.mark.parametrize("steps", [1, WIDTH, WIDTH + 1, 18_001])
def test_a_long_phase_has_a_short_curve(steps):
    """Every step is in one point, and tokens and minutes are those of all steps."""
    entries = [{"phase": "free", "target_cr": None, "cr": None, "step": i, "loss": float(i),
                "kl": 1.0, "tokens_per_second": 120} for i in range(steps)]
    told = phase_of(entries, 7200)
    assert told["minutes"] == steps and told["tokens"] == 7200 * steps
    assert len(told["curve"]) <= POINTS + 1 and told["curve"][-1]["step"] == steps - 1
    ends = [-1, *(p["step"] for p in told["curve"])]
    for before, p in zip(ends, told["curve"], strict=False):
        assert p == {"step": p["step"], "kl": 1, "loss": (before + 1 + p["step"]) / 2}


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "cr2/figures.json"])
def test_damage_is_told(name, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / name).write_text("[]\n")
    with pytest.raises(InputError, match=f"{name}.*restore it"):
        history(run, settings_of(run))
