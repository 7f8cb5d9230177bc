"""The history of a run in short, for a file of results."""

from dataclasses import asdict
from itertools import groupby

import numpy as np

from nanodmc.records import read_curve, read_figures, read_summary

WIDTH = 10               # steps at least that a point of the curve is the mean of
POINTS = 24              # points of a phase's curve at most, and perhaps one more
ORIGIN = "date", "commit", "device", "versions"


def history(run, s, remedy="restore it from a copy"):
    """What the folder of a run with the Settings s tells of it, a dict that may become JSON.

    settings; the phases so far, with steps, tokens, minutes and their curve; of each model what was
    measured on the validation text; and of a finished run where and when it ended. Raises
    InputError.
    """
    parts = groupby(read_curve(run / "metrics.jsonl", remedy), key=lambda entry: entry["index"])
    models = {path.parent.name: read_figures(path, remedy)
              for path in sorted(run.glob("*/figures.json"))}
    return {"settings": asdict(s),
            "phases": [phase_of(list(part), s.batch * s.context) for _, part in parts],
            "models": models, "finished": finished(run / "summary.json", remedy)}


def finished(path, remedy):
    """Of a run with this summary.json, where and when it ended; None of one without."""
    summary = read_summary(path, remedy) if path.exists() else {}
    return {key: summary[key] for key in ORIGIN if key in summary} or None


def phase_of(entries, tokens):
    """A phase from its entries in metrics.jsonl, in the order of steps. tokens: of a step."""
    width = max(WIDTH, -(-len(entries) // POINTS))
    speeds = [entry.get("tokens_per_second", 0) for entry in entries]
    return {"phase": entries[0]["phase"], "target_cr": entries[-1]["target_cr"],
            "steps": len(entries), "tokens": len(entries) * tokens,
            "minutes": round(sum(tokens / speed for speed in speeds if speed > 0) / 60, 1),
            "curve": [point(entries[i:i + width]) for i in range(0, len(entries), width)]}


def point(entries):
    """The means over some steps: of loss, and where there is any of kl, target CR and CR."""
    mean = {"step": entries[-1]["step"]}
    for name in ("loss", "kl", "target_cr", "cr"):
        values = [entry[name] for entry in entries if entry.get(name) is not None]
        if values:
            mean[name] = round(float(np.mean(values)), 4)
    return mean
