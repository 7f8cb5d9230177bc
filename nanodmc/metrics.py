"""metrics.jsonl of a run: a line for each step, and from time to time one on the screen."""

import json
import os
import zlib
from pathlib import Path

import numpy as np

from nanodmc.files import write_atomically
from nanodmc.optim import flops_per_token, flops_share, peak_memory
from nanodmc.parallel import rank_count, this_rank
from nanodmc.records import curve_until
from nanodmc.state import writing
from nanodmc.tables import LOG_HEAD, Pace, log_line


class Metrics:
    """The file, in a run's folder, and what its lines follow from. The first rank alone writes it.

    config: the Config of the model that the run starts from.
    """

    def __init__(self, out, settings, phases, config):
        self.path, self.settings, self.phases = out / "metrics.jsonl", settings, phases
        self.flops = flops_per_token(config, settings.context)
        self.file = None
        self.checksum = 0                 # CRC-32 of its lines
        self.past = None                  # what led to the saved state: text and entries
        self.pace = Pace()
        self.recent, self.shown = [], 0   # losses since the last regular line; lines so far

    def read(self, saved, remedy):
        """Read the part that led to a saved state. Raises InputError where it is not as saved."""
        self.past = curve_until(self.path, self.phases, saved["phase"], saved["step"], remedy,
                                saved["curve"])

    def open(self, index, step):
        """To append to, without the lines of steps that are trained again; once is enough."""
        if self.file is not None:
            return
        if this_rank():
            self.file = Path(os.devnull).open("a")  # noqa: SIM115 - closed with the run
            return
        (text, entries), self.past = self.past, None
        last_shown = step - step % self.settings.log_every
        self.recent = [e["loss"] for e in entries
                       if e["index"] == index and e["step"] >= last_shown]
        write_atomically(self.path, lambda f: f.write_text(text))
        self.checksum = zlib.crc32(text.encode())
        self.file = self.path.open("a", buffering=1)  # noqa: SIM115

    def flush(self):
        """What was recorded is on disk from now on."""
        if this_rank() == 0:
            os.fsync(self.file.fileno())

    def close(self):
        if self.file is not None:
            self.file.close()

    def record(self, index, step, figures, seconds):
        """Add a line for a step that took so many seconds. figures: its loss, kl, cr and heads."""
        loss, kl, cr, heads = figures
        phase, s = self.phases[index], self.settings
        self.pace.add(phase.dmc, seconds)
        speed = s.batch * s.context / self.pace.per_step(phase.dmc)
        last = step + 1 == phase.steps
        entry = {"index": index, "phase": phase.name, "step": step, "loss": loss,
                 "target_cr": phase.target(step), "cr": cr,
                 "lr": phase.learning_rate(step, s.warmup), "tokens_per_second": round(speed),
                 "mfu": flops_share(speed * self.flops / rank_count()),
                 "peak_gb": round(peak_memory() / 1e9, 2)}
        if kl is not None:
            entry["kl"] = kl
        if heads and (step + 1 in phase.keep or step % s.log_every == 0 or last):
            entry["heads"] = [[round(cr, 3) for cr in layer] for layer in heads]
        with writing(self.path.parent):
            line = json.dumps(entry) + "\n"
            self.file.write(line)
            self.checksum = zlib.crc32(line.encode(), self.checksum)
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

    def seconds_left(self, index, step):
        """What the present pace promises for the steps after this one, or None."""
        left = {True: 0, False: 0}
        for i, phase in enumerate(self.phases[index:]):
            left[phase.dmc] += phase.steps - (0 if i else step + 1)
        return self.pace.left(left)
