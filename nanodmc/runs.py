"""A run's folder: what a run writes, resumes from, and shows. The training itself is in train.py.

The folder holds `run.json` (the settings), `metrics.jsonl` (a line per step), `state.json` and a
folder of tensors (what --resume needs), a folder of weights per model with its `figures.json`, and
`summary.json` (the final table).
"""

import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from nanodmc.checkpoint import locate, remove_leftovers, runs_by_number, save
from nanodmc.claim import Claim
from nanodmc.cli import provenance, typed
from nanodmc.files import InputError, listed, write_json
from nanodmc.machine import slow_in_bf16
from nanodmc.metrics import Metrics
from nanodmc.optim import fitted, parameter_count, states
from nanodmc.parallel import (
    device_of_this_process,
    first_decides,
    gathered,
    over_ranks,
    rank_count,
    this_rank,
)
from nanodmc.phases import plan, starting_config
from nanodmc.records import CHOICE, read_choice, read_figures, read_state, write_sealed
from nanodmc.resumed import read_run, resumed_settings
from nanodmc.settings import new_settings
from nanodmc.state import check_weights, load_tensors, save_tensors, whole_phases, writing
from nanodmc.stopping import Stopped
from nanodmc.tables import heat_map, show, table
from nanodmc.terminal import to_show
from nanodmc.text import load_data
from nanodmc.tokenizer import Tokenizer

BEGINNING = {"phase": 0, "step": 0, "seconds": 0.0, "tensors": None, "files": None,
             "curve": None}                                            # the state of a new run
TENSORS = re.compile(r"state-\d+-\d+")        # the name of a folder of them: phase and step
ANEW = "restore it, or add --redo to begin anew what it spoils"


# ----------------------------------------------------------------------------------------- a run

class Run:
    """A run in a folder that was claimed: a new one, or one that goes on from its saved state.

    memory: bytes that each card may hold; None: what is free. resume: the folder holds the run
    already. redo: go on from where its files are whole, without its state. Raises InputError, with
    nothing written yet, where the run is impossible. `with` gives the folder back.
    """

    def __init__(self, settings, claim, memory=None, resume=False, redo=False):
        self.settings, self.claim, self.out = settings, claim, claim.out
        self.rank, self.ranks = this_rank(), rank_count()
        self.started = time.perf_counter()
        self.stop = False                 # whether a signal asked the run to end
        before = read_run(self.out)["text"] if resume else None
        self.device = device_of_this_process()
        self.given = None                 # the folder of the checkpoint to start from
        if settings.init and not settings.random_weights:
            self.given = locate(settings.init).resolve()
        self.phases = plan(settings, self.given)
        self.config = starting_config(settings, self.given)      # of the model to start from
        opening = self.check_model(memory)
        opening["text"] = self.read_text(before)
        if resume and before != self.key:
            raise InputError(f"the text is not the one that {self.out} was trained on; restore it, "
                             "or start a new run.")
        self.saved = BEGINNING            # the state that is on disk
        if redo:
            self.saved = BEGINNING | {
                "phase": first_decides(lambda: whole_phases(self.out, self.phases, ANEW))}
        elif resume and (self.out / "state.json").exists():
            self.saved = read_state(self.out / "state.json", self.phases, ANEW)
        self.seconds_before = self.saved["seconds"]
        self.metrics = Metrics(self.out, settings, self.phases, self.config)
        first_decides(lambda: self.metrics.read(self.saved, ANEW))
        self.wait()
        self.tidy()
        self.write_json("run.json", {"settings": asdict(settings),
                                     "train_tokens": len(self.train_tokens), "text": self.key})
        if redo:
            self.write_json("state.json", self.saved)
            if self.rank == 0 and any(p.chooses for p in self.phases[self.saved["phase"]:]):
                (self.out / CHOICE).unlink(missing_ok=True)
        for name, line in {"run": str(self.out), **opening}.items():
            show(line, name)
        self.show_phases(resume)

    def check_model(self, memory):
        """Read sizes and tokenizer of the model to start from; refuse what memory cannot hold.

        Returns what there is to say of model and memory, by name.
        """
        s, config = self.settings, self.config
        if s.batch % (self.ranks * (s.micro_batch or 1)):
            raise InputError(f"--batch {s.batch} cannot be shared by {self.ranks} cards with "
                             f"--micro-batch {s.micro_batch}; choose a multiple.")
        self.recompute, planned = fitted(config, s, memory, self.ranks)
        self.tokenizer = Tokenizer.from_folder(self.given) if self.given else Tokenizer.bytes()
        opening = {
            "model": f"{s.init or 'a small Llama'}, {parameter_count(config):,} parameters in "
                     f"{s.precision}: {config.n_layer} layer{'s' * (config.n_layer > 1)}, "
                     f"{config.n_head} heads, width {config.dim}",
            "memory": planned}
        if s.lean and slow_in_bf16(self.device):
            opening["precision"] = ("bf16, in which this processor is several times slower than "
                                    "in fp32")
        return opening

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

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.metrics.close()
        self.claim.release()

    # ------------------------------------------------------------------------ files and the state

    def write_json(self, name, value):
        if self.rank == 0:
            write_sealed(self.out / name, value)

    def tidy(self):
        """Remove what a kill left: unfinished writes, and tensors that no state names."""
        self.remove_states()
        if self.rank == 0:
            below = (path for path in self.out.iterdir() if path.is_dir())
            for folder in (self.out, *(path for path in below if not path.is_symlink())):
                remove_leftovers(folder)

    def check_weights(self, folder):
        """Raises InputError where the weights that an earlier phase left are not as saved."""
        if self.out / folder != Path(folder):           # a given model may have no checksum
            first_decides(lambda: check_weights(self.out / folder, ANEW))

    def choice(self, make):
        """The Choice of the control channels: what make() returns, the first time."""
        if not (self.out / CHOICE).exists():
            self.write_json(CHOICE, asdict(make()))
            self.wait()
        choice = read_choice(self.out, self.config, ANEW)
        show(f"rotary pair {choice.pair} is freed of one channel", "control")
        return choice

    def load_state(self, model, optimizer):
        """Read the saved tensors into a model and its optimizer. Any number of ranks saved them."""
        load_tensors(self.out / self.saved["tensors"], states(model, optimizer),
                     self.saved["files"], ANEW)
        for moments in optimizer.state.values():
            moments["step"].fill_(self.saved["step"])

    def save_state(self, index, step, model=None, optimizer=None):
        """Save that the run got to this step of a phase. model None: to the phase's beginning.

        state.json names the folder with the tensors, and is replaced when that is whole. So a kill
        at any moment, or a full disk, leaves the old state or the new one.
        """
        name = f"state-{index}-{step}" if model is not None else None
        files = self.saved["files"] if name == self.saved["tensors"] else None
        with writing(self.out):
            if name and name != self.saved["tensors"]:
                self.remove_states()
                try:
                    files = save_tensors(self.out / name, states(model, optimizer))
                except (Exception, CheckpointException):
                    shutil.rmtree(self.out / name, ignore_errors=True)
                    raise
            self.metrics.flush()              # on disk before the state that it leads to
        self.saved = {"phase": index, "step": step, "seconds": self.seconds(), "tensors": name,
                      "files": files, "curve": self.metrics.checksum}
        self.write_json("state.json", self.saved)
        self.remove_states()
        self.wait()

    def remove_states(self):
        """Remove every folder of tensors but the saved state's."""
        for folder in self.out.iterdir() if self.rank == 0 else ():
            if TENSORS.fullmatch(folder.name) and folder.name != self.saved["tensors"]:
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
        return read_figures(self.out / folder / "figures.json", ANEW)

    def finish(self, summary):
        """Write summary.json and show the table and the heat map."""
        facts = {"seconds": self.seconds(), "settings": asdict(self.settings), **provenance()}
        if self.rank == 0:
            write_json(self.out / "summary.json", summary | facts)
        print(table(summary))
        print(heat_map(summary["dmc"][-1]["heads"]))
        print(to_show(f"\n{facts['seconds']:.0f} s. Everything is in {self.out}. Next:\n"
                      f"    {typed('generate.py', '--ckpt', self.out)}"))

    def seconds(self):
        """How long the run has taken, over all sittings."""
        return self.seconds_before + time.perf_counter() - self.started


def open_run(given, options):
    """The Run that the flags ask for: a new one, or with --resume one that goes on.

    given: settings, a dict. options: a namespace with out, resume, redo, preset and memory (GB).
    """
    memory, resume, out = options.memory and options.memory * 1e9, options.resume, options.out
    if options.redo and not resume:
        raise InputError("--redo is for a run that is there; add --resume.")
    if resume:
        newest = (path for path in reversed(runs_by_number()) if (path / "run.json").exists())
        out = out or next(newest, None)
        if out is None:
            raise InputError("there is no run to resume in runs; give its folder with --out.")
    else:
        if given.get("init") and not given.get("data") and not given.get("random_weights"):
            raise InputError("--init needs text to train on; add --data FILE.")  # no download yet
        settings = new_settings(given, options.preset)
    claim = Claim(out, resume)
    try:
        if resume:
            settings = resumed_settings(claim.out, given)
        return Run(settings, claim, memory, resume, options.redo)
    except BaseException:
        claim.release()
        raise
