"""The model that a phase of a training run starts with, and its teacher."""

from dataclasses import replace

import torch

import dmc
from nanodmc import control_pair, first_decisions
from nanodmc.checkpoint import load, random_model
from nanodmc.cli import OPS
from nanodmc.config import shape
from nanodmc.optim import ready
from nanodmc.tables import show
from nanodmc.text import first_sequences
from nanodmc.variants import group_heads


def build(run, phase):
    """The model that a phase starts with."""
    s, ops = run.settings, OPS[run.settings.ops]
    if phase.start is not None:
        run.check_weights(phase.start)
        own = (run.device, s.dtype) if run.ranks == 1 else (None, None)   # else layer by layer
        choice = run.choice(lambda: choose_pair(run, phase)) if phase.chooses else None
        moved = {"control_pair": choice.pair} if choice else {}
        fits = phase.fits and not run.saved["tensors"]          # which hold what became of them
        decisions = fit_decisions(run, phase) if fits else None
        model = load(run.out / phase.start, ops, *own, **s.method(phase.dmc), **moved)
        if choice:
            control_pair.apply(choice, model)
        if decisions:
            first_decisions.apply(decisions, model)
        if phase.grouped > 1:
            model = group_heads(model, phase.grouped, ops)
    else:
        torch.manual_seed(s.seed)
        model = (random_model(shape(s.init), ops, dtype=s.dtype) if s.init
                 else dmc.Transformer(s.small_config(), ops).to(s.dtype))
    return ready(model, s, run.device, run.recompute)


def choose_pair(run, phase):
    """The Choice of the control channels, by the first tokens that a phase reads."""
    plain = build(run, replace(run.phases[0], start=phase.start))
    return control_pair.choose(plain, first_sequences(
        run.train_tokens, run.settings, phase.position, run.device))


def fit_decisions(run, phase):
    """The rows that a retrofit starts with, by the first tokens that it reads."""
    freed = build(run, replace(phase, fits=False))
    sequences = first_sequences(run.train_tokens, run.settings, phase.position, run.device,
                                first_decisions.TOKENS)
    show(f"fitted to what merging costs on {first_decisions.TOKENS:,} tokens", "decisions")

    def seen():
        for x in sequences:
            run.stop_if_asked()
            yield x

    return first_decisions.fit(freed, seen())


def teacher_of(run):
    """The model before its retrofit, whose logits are what a taught phase aims at."""
    return build(run, replace(run.phases[0], start=run.phases[1].start))
