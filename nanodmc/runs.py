"""A run's folder: what a run writes, resumes from, and shows. The training itself is in train.py.

The folder holds `run.json` (the settings), `metrics.jsonl` (a line per step), `state.json` and a
folder of tensors (what --resume needs), a folder of weights per model with its `figures.json`, and
`summary.json` (the final table).
"""

import json
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from nanodmc.checkpoint import locate, runs_by_number, save
from nanodmc.cli import provenance, typed
from nanodmc.config import read_config, shape
from nanodmc.files import InputError, listed, read_json, reason, write_atomically, write_json
from nanodmc.optim import (
    checked_memory,
    flops_per_token,
    flops_share,
    free_memory,
    memory_plan,
    parameter_count,
    peak_memory,
    states,
)
from nanodmc.parallel import device_of_this_process, gathered, over_ranks, rank_count, this_rank
from nanodmc.phases import plan
from nanodmc.settings import new_settings, resumed_settings
from nanodmc.stopping import Stopped
from nanodmc.tables import LOG_HEAD, Pace, heat_map, log_line, show, table
from nanodmc.text import load_data
from nanodmc.tokenizer import Tokenizer
from nanodmc.variants import check_groups

BEGINNING = {"phase": 0, "step": 0, "seconds": 0.0, "tensors": None}   # the state of a new run


def starting_config(settings, given):
    """The Config of the model that a run starts from. given: the folder of a checkpoint, or None.

    Raises InputError where that model cannot be retrofitted.
    """
    config = (settings.small_config() if not settings.init else
              read_config(given) if given else shape(settings.init))
    if config.dmc:
        raise InputError(f"{given} is a DMC model already; give the plain model that it was made "
                         "of.")
    if settings.variant == "gqa":
        check_groups(config, int(settings.cr))
    if settings.context > config.max_seq_len:
        raise InputError(f"--context {settings.context} is more than the model's "
                         f"{config.max_seq_len} positions; lower it.")
    return config


def check_folder(folder):
    """Raises InputError where a folder cannot be made, or not be written to. Makes nothing."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "may not be written to" if there.is_dir() else "is no folder"
        raise InputError(f"{folder} cannot be written ({there} {what}); choose another --out.")


@contextmanager
def writing(folder):
    """Raises InputError where something in the folder cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        raise InputError(f"{folder} cannot be written ({root_reason(error)}); free some space, "
                         "then --resume: the state saved before is whole.") from None


def root_reason(error):
    """files.reason of what led to a failed write, wherever PyTorch keeps it."""
    # a CheckpointException has the errors of all ranks
    errors = [first for first, _ in getattr(error, "failures", {}).values()] or [error]
    for e in errors:
        if e.__context__ is not None:           # which led to it
            errors.append(e.__context__)
        if isinstance(e, OSError) and e.errno:
            return os.strerror(e.errno)
    if any("enforce fail" in str(e) for e in errors):       # of the file that torch writes
        return "a file was cut short, as on a full disk"
    return reason(errors[0])


# ----------------------------------------------------------------------------------------- a run

class Run:
    """A run in its folder: claims the folder, or goes on from its last saved state.

    memory: bytes that each card may hold; None: what is free. resume: the folder holds the run
    already. Raises InputError, with nothing written yet, where the run is impossible.
    """

    def __init__(self, settings, out, memory=None, resume=False):
        self.settings, self.out = settings, Path(out)
        self.rank, self.ranks = this_rank(), rank_count()
        self.started = time.perf_counter()
        self.stop = False                 # whether a signal asked the run to end
        self.metrics = None               # metrics.jsonl, once it is open
        self.pace = Pace()
        self.recent, self.shown = [], 0   # losses since the last regular line; lines so far
        if self.has("run.json") and not resume:
            raise InputError(f"{self.out} already holds a run; add --resume to continue it, or "
                             "choose another --out.")
        before = str(self.read_json("run.json").get("text")) if resume else None
        self.device = device_of_this_process()
        self.given = None                 # the folder of the checkpoint to start from
        if settings.init and not settings.random_weights:
            self.given = locate(settings.init).resolve()
        self.phases = plan(settings, self.given)
        opening = self.check_model(memory)
        check_folder(self.out)
        opening["text"] = self.read_text(before)
        if resume and before != self.key:
            raise InputError(f"the text is not the one that {self.out} was trained on; restore it, "
                             "or start a new run.")
        self.saved = BEGINNING            # the state that is on disk
        if resume and self.has("state.json"):
            self.saved = self.read_json("state.json")
        self.seconds_before = self.saved["seconds"]
        self.wait()
        self.write_json("run.json", {"settings": asdict(settings),
                                     "train_tokens": len(self.train_tokens), "text": self.key})
        for name, line in {"run": str(self.out), **opening}.items():
            show(line, name)
        self.show_phases(resume)

    def check_model(self, memory):
        """Read sizes and tokenizer of the model to start from; refuse what memory cannot hold.

        Returns what there is to say of model and memory, by name.
        """
        s, config = self.settings, starting_config(self.settings, self.given)
        if s.batch % (self.ranks * (s.micro_batch or 1)):
            raise InputError(f"--batch {s.batch} cannot be shared by {self.ranks} cards with "
                             f"--micro-batch {s.micro_batch}; choose a multiple.")
        self.flops = flops_per_token(config, s.context)
        self.tokenizer = Tokenizer.from_folder(self.given) if self.given else Tokenizer.bytes()
        return {
            "model": f"{s.init or 'a small Llama'}, {parameter_count(config):,} parameters: "
                     f"{config.n_layer} layers, {config.n_head} heads, width {config.dim}",
            "memory": checked_memory(memory_plan(config, s, self.ranks), memory or free_memory())}

    def read_text(self, key):
        """Read the text, as tokens; returns what there is to say of it.

        The first rank tokenizes; the others find it done.
        """
        for turn in range(min(self.ranks, 2)):
            if turn == min(self.rank, 1):
                data = load_data(self.settings, self.given, key)
                self.train_tokens, self.val_tokens, self.key = data
            self.wait()
        source = listed(self.settings.data or ["the sources of Python's standard library"], 2)
        return (f"{source}: {len(self.train_tokens):,} {self.unit}s to train on, "
                f"{len(self.val_tokens):,} to validate on")

    def show_phases(self, resume):
        """Say what the run will do, and where it goes on."""
        done, step = self.saved["phase"], self.saved["step"]
        steps = ", ".join(f"{phase.title} {phase.steps:,}".replace(" ", "\N{NO-BREAK SPACE}")
                          for phase in self.phases)
        show(f"{steps}: {sum(phase.steps for phase in self.phases):,} steps", "phases")
        if done == len(self.phases):
            show(f"{self.out} is finished; here is its table again")
        elif resume:
            phase = self.phases[done]
            show(f"{self.out} goes on in {phase.title} at step {step + 1} of {phase.steps}")

    @property
    def unit(self):
        """What a token of the text is."""
        return "token" if self.given else "byte"

    def wait(self):
        """Until all ranks are here."""
        if self.ranks > 1:
            dist.barrier()

    def stop_if_asked(self):
        """Raises Stopped once a signal came to any rank. Called where nothing is half done."""
        if over_ranks(torch.tensor(float(self.stop))).item():
            raise Stopped

    # ------------------------------------------------------------------------ files and the state

    def has(self, name):
        return (self.out / name).exists()

    def read_json(self, name):
        return read_json(self.out / name)

    def write_json(self, name, value):
        if self.rank == 0:
            write_json(self.out / name, value)

    def load_state(self, model, optimizer):
        """Read the saved tensors into a model and its optimizer. Any number of ranks saved them."""
        path = self.out / self.saved["tensors"]
        try:
            dcp.load(states(model, optimizer), checkpoint_id=path, no_dist=self.ranks == 1)
        except (Exception, CheckpointException) as error:      # many kinds for a damaged file
            raise InputError(
                f"{path} is damaged ({type(error).__name__}); start a new run.") from None
        for moments in optimizer.state.values():
            moments["step"].fill_(self.saved["step"])

    def save_state(self, index, step, model=None, optimizer=None):
        """Save that the run got to this step of a phase. model None: to the phase's beginning.

        state.json names the folder with the tensors, and is replaced when that is whole. So a kill
        at any moment, or a full disk, leaves the old state or the new one.
        """
        name = f"state-{index}-{step}" if model is not None else None
        with writing(self.out):
            if name and name != self.saved["tensors"]:
                self.remove_states()
                try:
                    dcp.save(states(model, optimizer), checkpoint_id=self.out / name,
                             no_dist=self.ranks == 1)
                except (Exception, CheckpointException):
                    shutil.rmtree(self.out / name, ignore_errors=True)
                    raise
            if self.rank == 0:                # the curve is on disk before the state it leads to
                os.fsync(self.metrics.fileno())
        self.saved = {"phase": index, "step": step, "seconds": self.seconds(), "tensors": name}
        self.write_json("state.json", self.saved)
        self.remove_states()
        self.wait()

    def remove_states(self):
        """Remove every folder of tensors but the saved state's."""
        for folder in self.out.glob("state-*") if self.rank == 0 else ():
            if folder.name != self.saved["tensors"]:
                shutil.rmtree(folder)
        self.wait()

    def save_model(self, model, folder, **facts):
        """Write a model as a checkpoint, with facts for its config.json."""
        model = gathered(model) if self.ranks > 1 else model
        if self.rank == 0:
            save(model, self.out / folder, self.tokenizer, **facts)
        self.wait()

    def save_figures(self, folder, loss, cr, heads, target=None):
        """Write and show what was measured when a phase ended. target: the CR it was to reach."""
        self.write_json(f"{folder}/figures.json", {"loss": loss, "cr": cr, "heads": heads})
        aim = f" (target {target:g})" if target else ""
        print(f"{'':<12}validation {loss:.4f} nats per {self.unit} at CR {cr:.2f}{aim} -> {folder}",
              flush=True)

    def figures(self, folder):
        """What `save_figures` wrote: a dict with loss, cr and heads."""
        return self.read_json(f"{folder}/figures.json")

    def finish(self, summary):
        """Write summary.json and show the table and the heat map."""
        facts = {"seconds": self.seconds(), "settings": asdict(self.settings), **provenance()}
        self.write_json("summary.json", summary | facts)
        print(table(summary))
        print(heat_map(summary["dmc"][-1]["heads"]))
        print(f"\n{facts['seconds']:.0f} s. Everything is in {self.out}. Next:\n"
              f"    {typed('generate.py', '--ckpt', self.out)}")

    # ------------------------------------------------------------------------ metrics and progress

    def open_metrics(self, index, step):
        """Open metrics.jsonl to append to, without the lines of steps that are trained again."""
        if self.rank:
            self.metrics = Path(os.devnull).open("a")  # noqa: SIM115 - closed with the run
            return
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        kept = [e for e in entries if (e["index"], e["step"]) < (index, step)]
        last_shown = step - step % self.settings.log_every
        self.recent = [e["loss"] for e in kept if e["index"] == index and e["step"] >= last_shown]
        text = "".join(json.dumps(e) + "\n" for e in kept)
        write_atomically(path, lambda f: f.write_text(text))
        self.metrics = path.open("a", buffering=1)  # noqa: SIM115

    def record(self, index, step, figures, seconds):
        """A line of metrics.jsonl for a step that took so many seconds; some also on the screen.

        figures: of the step: loss, kl, cr and heads.
        """
        loss, kl, cr, heads = figures
        phase, s = self.phases[index], self.settings
        self.pace.add(phase.dmc, seconds)
        speed = s.batch * s.context / self.pace.per_step(phase.dmc)
        last = step + 1 == phase.steps
        entry = {"index": index, "phase": phase.name, "step": step, "loss": loss,
                 "target_cr": phase.target(step), "cr": cr,
                 "lr": phase.learning_rate(step, s.warmup), "tokens_per_second": round(speed),
                 "mfu": flops_share(speed * self.flops / self.ranks),
                 "peak_gb": round(peak_memory() / 1e9, 2)}
        if kl is not None:
            entry["kl"] = kl
        if heads and (step + 1 in phase.keep or step % s.log_every == 0 or last):
            entry["heads"] = [[round(cr, 3) for cr in layer] for layer in heads]
        with writing(self.out):
            self.metrics.write(json.dumps(entry) + "\n")
        self.recent.append(loss)
        regular = last or (step + 1) % s.log_every == 0
        if regular or self.shown == 0:        # something appears after the first step already
            if self.shown % 25 == 0:
                print(LOG_HEAD)
            loss = float(np.mean(self.recent))
            print(log_line(phase, entry, loss, self.seconds_left(index, step)), flush=True)
            self.shown += 1
        if regular:
            self.recent = []

    def seconds(self):
        """How long the run has taken, over all sittings."""
        return self.seconds_before + time.perf_counter() - self.started

    def seconds_left(self, index, step):
        """What the present pace promises for the steps after this one, or None."""
        left = {True: 0, False: 0}
        for i, phase in enumerate(self.phases[index:]):
            left[phase.dmc] += phase.steps - (0 if i else step + 1)
        return self.pace.left(left)


def open_run(given, options):
    """The Run that the flags ask for: a new one, or with --resume one that goes on.

    given: settings, a dict. options: a namespace with out, resume, preset and memory (GB).
    """
    memory = options.memory and options.memory * 1e9
    if options.resume:
        out = options.out or next(reversed(runs_by_number()), None)
        if out is None:
            raise InputError("there is no run to resume in runs; give its folder with --out.")
        return Run(resumed_settings(out, given), out, memory, resume=True)
    numbers = [int(path.name) for path in runs_by_number()]
    out = options.out or Path("runs") / str(max(numbers, default=0) + 1)
    if given.get("init") and not given.get("data") and not given.get("random_weights"):
        raise InputError("--init needs text to train on; add --data FILE.")     # before a download
    return Run(new_settings(given, options.preset), out, memory)
