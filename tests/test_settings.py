"""Properties of nanodmc/settings.py: what a run is asked for, and the phases that follow."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanodmc.files import InputError
from nanodmc.phases import plan
from nanodmc.settings import PRESETS, Settings
from nanodmc.text import batch


def test_learning_rates_and_targets():
    pretrain, free, retrofit, solidify = plan(Settings(warmup=10))[:4]
    assert pretrain.learning_rate(0, 10) == pytest.approx(pretrain.lr / 10)
    assert pretrain.learning_rate(pretrain.steps, 10) == pytest.approx(pretrain.lr / 10)
    last = retrofit.steps - 1
    assert retrofit.learning_rate(100, 10) == retrofit.learning_rate(last, 10) == retrofit.lr
    assert retrofit.target(last) == 4 and solidify.target(0) == 2
    assert pretrain.target(0) is None and free.target(0) is None


def test_the_models_of_a_run_see_the_same_batches():
    """The control and every kept model end after as many steps, at the same place of the data."""
    s = Settings()
    control = plan(s)[-1]
    solidified = [p for p in plan(s) if p.name == "solidify"]
    assert control.name == "control" and control.position == s.pretrain_steps
    assert len(solidified) == 3
    assert {p.position + p.steps for p in solidified} == {control.position + control.steps}
    tokens = np.arange(1000, dtype=np.uint16)
    a, b = (batch(tokens, s, 7, "cpu") for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[0][:, 1:], a[1][:, :-1])
    assert not torch.equal(a[0], batch(tokens, s, 8, "cpu")[0])


@given(st.floats(1, 8), st.lists(st.floats(1, 8), max_size=4), st.integers(50, 400),
       st.sampled_from([None, "given"]), st.booleans())
def test_every_phase_starts_from_weights_that_are_there(cr, keep, steps, given_model, control):
    """Each phase goes on where the data of its weights ended, and the target rises to each CR."""
    keep = [k for k in keep if k <= cr]
    s = Settings(cr=cr, keep=keep or None, retrofit_steps=steps, init=given_model, control=control)
    try:
        phases = plan(s, given_model)
    except InputError as error:
        assert "fall on the same step" in str(error)
        kept = [1, *s.kept()]
        assert min(np.diff(kept)) <= 2 * cr / steps
        return
    seen = {given_model or None: 0}                  # folder of weights -> steps of data behind it
    for phase in phases:
        assert phase.position == seen[phase.start]
        if phase.out and phase.weights == phase.out:
            seen[phase.out] = phase.position + phase.steps
        for step, folder in phase.keep.items():
            seen[folder] = phase.position + step
            cr_there = float(folder.removeprefix("retrofit-"))
            assert abs(phase.target(step - 1) - cr_there) <= (cr - 1) / steps + 1e-3 or step == 1
    assert {f"cr{k:g}" for k in s.kept()} <= seen.keys()
    assert ("control" in seen) == (control or not given_model)
    if "control" in seen:
        assert {seen[f"cr{k:g}"] for k in s.kept()} == {seen["control"]}


def test_presets_are_the_papers(tmp_path):
    """What stands in EQUATIONS.md's table, in tokens."""
    for name, lr in (("llama2-7b", 3e-5), ("llama2-13b", 3e-5), ("llama2-70b", 1.5e-5)):
        s = Settings(**{**PRESETS[name], "init": name})
        step = s.batch * s.context
        assert (s.lr, s.tau, s.c, s.window, s.cr_weight) == (lr, 0.1, 5, 12, 1)
        assert s.precision == "bf16"
        assert (s.beta2, s.eps, s.weight_decay, s.clip) == (0.95, 1e-5, 0.1, 1)
        assert s.free_steps * step == pytest.approx(1e9, rel=0.05)
        assert s.solidify_steps * step == pytest.approx(8e9, rel=0.05)
        phases = plan(s, tmp_path)
        names = ["pretrain", "free", "retrofit", "solidify", "solidify", "solidify"]
        assert [p.name for p in phases] == names
        assert phases[2].keep == {6000: "retrofit-2", 12000: "retrofit-3", 18000: "retrofit-4"}
        assert 6000 * step == pytest.approx(24e9, rel=0.05)
        assert {p.steps for p in phases[3:]} == {2000}
        assert [phases[2].target(i) for i in (5999, 11999)] == [2, 3]


def test_noise_falls_in_solidify_alone():
    for phase in plan(Settings(final_noise=0.1)):
        noise = [phase.noise(step) for step in range(phase.steps)]
        if phase.name == "solidify":
            assert noise[-1] == pytest.approx(0.1)
            ratios = np.divide(noise[1:], noise[:-1])
            assert noise[0] < 1 and ratios == pytest.approx(ratios[0]) and ratios[0] < 1
        else:
            assert set(noise) == {1.0}


def test_settings_that_contradict_each_other_are_refused_by_the_flag_to_change():
    for flag, changes in {"--lr": {"lr": math.nan}, "--clip": {"clip": math.inf},
                          "--eps": {"eps": -1.0}, "--heads": {"heads": 0},
                          "--beta2": {"beta2": 1.0}, "--cr": {"cr": 0.5},
                          "--cr is 1e.09": {"cr": 1e9}, "--keep": {"keep": [5.0]},
                          "--solidify": {"keep": [2.0], "solidify": [3.0]},
                          "--micro-batch": {"micro_batch": 3}}.items():
        with pytest.raises(InputError, match=flag):
            Settings(**changes)


def test_kept_and_solidified_models():
    assert Settings(cr=4.0).kept() == [2, 3, 4] and Settings(cr=2.5).kept() == [2, 2.5]
    s = Settings(keep=[4.0, 2.0, 2.0], solidify=[4.0, 2.0])
    assert s.kept() == [2, 4] and s.solidified() == [4, 2]
    again = Settings(**asdict(s))                    # as run.json has them
    assert again == s and replace(s, solidify=None).solidified() == [2, 4]
