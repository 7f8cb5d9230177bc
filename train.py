"""Retrofit a Llama with DMC.

    python train.py                              a small model, on a laptop
    python train.py --init llama2-7b --data F    Llama 2 7B, on one 80 GB card
    torchrun --nproc_per_node N train.py ...     on N cards

A run has five phases. Each starts from the weights that an earlier one left behind.

    pretrain   a small plain Llama learns the text; a model given with --init
               is only measured
    free       Eq. 12 fades the control channels out of the attention scores;
               then the weights that feed them are set to zero
    retrofit   the decisions are on, and the target CR rises linearly from 1;
               at each whole CR a copy of the weights is kept
    solidify   each copy trains on at its CR while the learning rate decays
    control    the pretrained model trains for as many further steps without
               compression, to compare with; with --init only if --control
               asks for it

Everything is written to the folder --out: settings, figures of every step, checkpoints, a table.
"""

from nanodmc import interrupts

# isort: split
import argparse
import math
import os
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import dmc
from nanodmc.baselines import pooling_cache
from nanodmc.checkpoint import random_model
from nanodmc.cli import OPS, Parser, number, provenance, run_command
from nanodmc.config import shape
from nanodmc.evaluate import evaluate
from nanodmc.files import InputError, write_json
from nanodmc.losses import language_loss, taught_loss
from nanodmc.optim import (
    before_training,
    fitted,
    flops_per_token,
    flops_share,
    new_optimizer,
    peak_memory,
    ready,
    release,
)
from nanodmc.parallel import (
    control_rows,
    device_of_this_process,
    mean,
    passes_per_step,
    rank_count,
    this_rank,
)
from nanodmc.phases import Phase
from nanodmc.plots import plot_runs
from nanodmc.runs import open_run
from nanodmc.settings import PRESETS, add_flags, new_settings, ratios
from nanodmc.starts import build, teacher_of
from nanodmc.stopping import Stopped, end_at_signals, heeded
from nanodmc.tables import averaged, show
from nanodmc.text import batch
from nanodmc.variants import VARIANTS, compression_term

interrupts.catch()

# ------------------------------------------------------------------------------------ the phases

def train(run):
    """All phases of a run, from its last saved state on; then the table."""
    before_training()
    for index in range(run.saved["phase"], len(run.phases)):
        train_phase(run, index)
        release()
    compare(run)


def train_phase(run, index):
    """One phase: from its start's weights, or from a state that was saved in the middle of it."""
    phase, s, step = run.phases[index], run.settings, run.saved["step"]
    model = build(run, phase)
    teacher = teacher_of(run) if phase.taught else None
    optimizer = new_optimizer(model, s, passes_per_step(s))
    if run.saved["tensors"]:
        run.load_state(model, optimizer)
    run.metrics.open(index, step)       # only now is it sure that the run can go on from here
    while step < phase.steps:
        began = time.perf_counter()
        try:
            parts = passes(run, index, step)
            figures = train_step(model, optimizer, phase, step, parts, s, teacher)
        except Stopped:
            run.save_state(index, step, model, optimizer)
            raise
        except FloatingPointError as error:
            rate = "--pretrain-lr" if phase.name == "pretrain" else "--lr"
            raise InputError(
                f"{error} at step {step} of {phase.name}, batch {phase.position + step} of the "
                f"data; the last good state, before step {run.saved['step']} of "
                f"{run.phases[run.saved['phase']].name}, is kept: --resume with a lower {rate} "
                "or --clip.") from None
        run.metrics.record(index, step, figures, time.perf_counter() - began)
        step += 1
        if step in phase.keep:
            run.save_model(model, phase.keep[step], phase=phase.name,
                           target_cr=phase.target(step - 1), cr=figures.cr)
        if step < phase.steps and step % s.save_every == 0:
            run.save_state(index, step, model, optimizer)
    optimizer.zero_grad()
    del optimizer, teacher              # whose memory the evaluation may need
    end_phase(run, phase, model)
    run.save_state(index + 1, 0)
    run.stop_if_asked()


def end_phase(run, phase, model):
    """After the last step of a phase: measure its model and save it."""
    if phase.fade:
        for rows in control_rows(model):
            rows.zero_()
    if phase.out is None:
        return
    loss, cr, heads = evaluate(model, run.val_tokens, run.settings)
    facts = {"phase": phase.name, "target_cr": phase.aim, "cr": cr} if phase.dmc else {}
    if phase.grouped > 1:               # beside the model that had all heads
        cr, heads = cr * phase.grouped, [[x * phase.grouped for x in row] for row in heads]
        facts = {"kv_heads_before_gqa": model.config.n_kv_head * phase.grouped}
    if phase.weights == phase.out:
        run.save_model(model, phase.out, **facts)
    run.save_figures(phase.out, loss, cr, heads, phase.aim)


def compare(run):
    """The final table: each model beside averaging without learning, which is measured here.

    That is the control, or where there is none the model given, with every n tokens averaged; n is
    the whole number nearest to the CR that the model beside it was to reach.
    """
    s = run.settings
    baseline = run.phases[-1 if run.phases[-1].name == "control" else 0]
    plain = build(run, replace(baseline, start=baseline.weights))
    summary = {"unit": run.unit, "variant": VARIANTS[s.variant].title,
               "pretrained": run.figures("pretrained")["loss"], "dmc": []}
    if baseline.name == "control":
        summary["control"] = run.figures("control")["loss"]
    for target in s.solidified():
        run.stop_if_asked()
        entry = run.figures(f"cr{target:g}")
        pooling = pooling_cache(plain.Cache, every=averaged(target))
        pooled = evaluate(plain, run.val_tokens, s, pooling)[0]
        summary["dmc"].append({"target": target, **entry, "pooling": pooled})
    run.finish(summary)


# -------------------------------------------------------------------------------------- one step

class StepFigures(NamedTuple):
    """What a training step measured, before its update."""
    loss: float          # LM loss, nats per token
    kl: float | None     # from the teacher, nats per token
    cr: float | None     # of the noisy decisions, where there are any
    heads: list | None   # the same of each layer and head


def train_step(model, optimizer, phase, step, passes, s, teacher=None):
    """One update, from the gradients of `passes`, with equally many sequences in each.

    passes: for each, how many there are, inputs and targets (B, T). teacher: the model whose logits
    have the share s.distill of the objective. Returns StepFigures. Raises FloatingPointError,
    before anything is changed, where loss or gradient are not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = phase.learning_rate(step, s.warmup)
    gain = dmc.channel_gain(step, phase.steps) if phase.fade else None
    optimizer.zero_grad()
    losses, kls, slots, head_slots = [], [], [], []
    for count, inputs, targets in passes:
        hidden, alpha = model.hidden(inputs, noise=phase.noise(step), gain=gain)
        if teacher is not None:
            with torch.no_grad():
                expected, _ = teacher.hidden(inputs)
            loss, lm, kl = taught_loss(model.lm_head, targets, hidden, teacher.lm_head, expected,
                                       s.distill)
            kls.append(kl)
        elif s.lean:
            loss = lm = language_loss(model.lm_head, targets, hidden)
        else:
            loss = lm = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())
        losses.append(lm.detach())
        if alpha is not None:
            loss = loss + compression_term(VARIANTS[s.variant], alpha, phase.target(step),
                                           s.cr_weight, exact=phase.name == "solidify")
            slots.append((1 - alpha.detach()).mean())
            head_slots.append((1 - alpha.detach()).mean((1, 3)))
        (loss / count).backward()
    if s.lean:
        norm = optimizer.clip(s.clip)
    else:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    loss, kl = mean(losses).item(), mean(kls).item() if kls else None
    if not math.isfinite(loss + norm.item()):
        raise FloatingPointError(f"the loss is {loss:.4g} and its gradient's norm "
                                 f"{norm.item():.4g}")
    if not slots:
        optimizer.step()
        return StepFigures(loss, kl, None, None)
    rows = control_rows(model)
    before = [row.clone() for row in rows]
    optimizer.step()
    for row, old in zip(rows, before, strict=True):      # these rows take larger steps
        row.copy_(torch.lerp(old, row, s.channel_lr_factor))
    return StepFigures(loss, kl, 1 / mean(slots).item(), (1 / mean(head_slots)).tolist())


def passes(run, index, step):
    """What `train_step` makes its gradient of: how many passes, inputs and targets of each."""
    s, position = run.settings, run.phases[index].position + step
    count, share = passes_per_step(s), s.batch // run.ranks
    size = share // count
    for row in range(run.rank * share, (run.rank + 1) * share, size):
        run.stop_if_asked()
        x, y = batch(run.train_tokens, s, position, run.device, range(row, row + size))
        seed = [s.seed, index, step] + ([row] if row else [])       # of the noise in the decisions
        torch.manual_seed(int(np.random.default_rng(seed).integers(2 ** 63)))
        yield count, x, y


# ----------------------------------------------------------------------------------------- speed

def measure_speed(s, steps, out):
    """Steps of a known shape with random weights and tokens, plain and with DMC: OUT/bench.json.

    Speed and memory of a card. The first three steps, which compile, are left out of the times.
    """
    ranks = rank_count()
    if steps < 4 or not s.init or s.batch % (ranks * (s.micro_batch or 1)):
        raise InputError("--bench needs 4 or more steps, --init llama2-7b or the like, and a "
                         "--batch that divides evenly.")
    before_training()
    figures = {}
    for name in ("plain", "dmc"):
        figures[name] = timed_steps(s, steps, name)
        release()
    ratio = figures["dmc"]["seconds_per_step"] / figures["plain"]["seconds_per_step"]
    for name, f in figures.items():
        print(f"{name:<6}{f['tokens_per_second']:10,.0f} tokens/s, MFU {f['mfu']}, "
              f"peak {f['peak_gb']:.1f} GB")
    print(f"a DMC step takes {ratio:.3f} times a plain one")
    if this_rank() == 0:
        facts = {"dmc_to_plain": ratio, "cards": ranks, "settings": asdict(s), **provenance()}
        write_json(out / "bench.json", {**figures, **facts})


def timed_steps(s, steps, name):
    """The figures of a model that is "plain" or "dmc"."""
    device, ranks, count = device_of_this_process(), rank_count(), passes_per_step(s)
    share, seconds = s.batch // ranks, []
    phase = Phase(name, None, None, steps, 0, 0, s.lr, dmc=name == "dmc",
                  cr=(1.0, s.cr) if name == "dmc" else None)
    config = shape(s.init, **s.method(phase.dmc))
    recompute, planned = fitted(config, s, ranks=ranks)
    show(planned, "memory")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(s.seed)
    place = device if ranks == 1 else None
    model = ready(random_model(config, OPS[s.ops], place, s.dtype), s, device, recompute)
    optimizer = new_optimizer(model, s, count)
    torch.manual_seed(s.seed + this_rank())
    for step in range(steps):
        began = time.perf_counter()
        x = torch.randint(config.vocab_size, (share, s.context + 1), device=device)
        cut = [(count, part[:, :-1], part[:, 1:]) for part in x.split(share // count)]
        loss, *_ = train_step(model, optimizer, phase, step, cut, s)
        seconds.append(time.perf_counter() - began)
        print(f"{name:<6}{step + 1:>4}/{steps}  loss {loss:.4f}  {seconds[-1]:.3f} s", flush=True)
    per_step = float(np.median(seconds[3:]))
    speed = s.batch * s.context / per_step
    return {"seconds_per_step": per_step, "tokens_per_second": speed,
            "peak_gb": peak_memory() / 1e9, "loss": loss,
            "mfu": flops_share(speed * flops_per_token(config, s.context) / ranks)}


# ---------------------------------------------------------------------------------- command line

def parse(argv):
    """The settings that were given as flags, a dict, and a namespace of the other flags."""
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("the run")
    group.add_argument("--out", type=Path, metavar="RUN",
                       help="its folder [runs/1, or the next number that is free]")
    group.add_argument("--resume", action="store_true",
                       help="continue the run in --out, or the newest one")
    group.add_argument("--redo", action="store_true", help="with --resume: leave a damaged state, "
                       "and begin the first phase anew whose results are not whole")
    group.add_argument("--preset", choices=PRESETS, metavar="NAME", help="which defaults: "
                       "laptop; llama2-7b, -13b, -70b (the paper's); given (the paper's settings, "
                       "in 600 steps of 64 sequences); few-tokens (distillation, 0.6 M tokens to "
                       "CR 4) [with --init the one that it names, else given; else laptop]")
    group.add_argument("--memory", type=number(1e-6, 1e6), metavar="GB",
                       help="what each card may hold [what is free]")
    other = parser.add_argument_group("instead of a run")
    other.add_argument("--plot", type=Path, nargs="+", metavar="RUN", help="draw what runs did so "
                       "far, as RUN/plot.png, and finished ones also as RUN/memory.png")
    other.add_argument("--bench", type=number(0, 10 ** 6, int), metavar="STEPS",
                       help="measure so many steps of --init llama2-7b or the like with random "
                       "weights, plain and with DMC, and write bench.json into --out")
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    options = argparse.Namespace(**{name: given.pop(name) for name in
                                    ("out", "resume", "redo", "preset", "memory", "plot", "bench")})
    for name in {"keep", "solidify"} & given.keys():
        given[name] = ratios(name, given[name])
    return given, options


def carry_out(argv):
    """Do what the command line asks for. Raises InputError, or Stopped after a signal."""
    given, options = parse(argv)
    if options.plot:
        plot_runs(options.plot)
    elif options.bench is not None:
        out = options.out or Path("runs")
        measure_speed(new_settings(given, options.preset), options.bench, out)
    else:
        end_at_signals()
        with open_run(given, options) as run, heeded(run):
            train(run)


def main(argv=None):
    torch.set_flush_denormal(True)    # products of many small alphas, which CPUs are slow at
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no torchrun
    if rank_count() > 1:
        if cuda := torch.cuda.is_available():
            torch.cuda.set_device(device_of_this_process())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        if this_rank():
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process lives
    try:
        return run_command("train.py", lambda: carry_out(argv))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
