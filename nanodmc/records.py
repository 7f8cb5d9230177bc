"""What a run writes as JSON, with checksums: read back only if it is whole and makes sense."""

import json
import math
import zlib
from pathlib import Path

from nanodmc.control_pair import Choice
from nanodmc.files import InputError, is_number, read_bytes, read_json, write_json

CHOICE = "control-pair.json"
FIGURES = {"loss", "cr", "heads"}
STATE = {"phase", "step", "seconds", "tensors"}


# ------------------------------------------------------------------------------- JSON with a seal

def seal(record):
    """The CRC-32 of a dict's JSON, in the order of its keys, in hex digits."""
    return f"{zlib.crc32(json.dumps(record).encode()):08x}"


def write_sealed(path, record):
    """Write a dict as JSON with its checksum, for `read_sealed`. Raises InputError."""
    write_json(path, record | {"checksum": seal(record)})


def damaged(path, what, remedy="restore it from a copy"):
    return InputError(f"{path} is damaged ({what}); {remedy}.")


def read_sealed(path, needed, more=(), remedy="restore it from a copy"):
    """The dict that `write_sealed` wrote, or an older version without a checksum.

    needed, more: the keys that it must and may have. Raises InputError where it is another.
    """
    try:
        record = read_json(path)
    except InputError as error:
        raise InputError(f"{str(error).partition(';')[0]}; {remedy}.") from None
    if not isinstance(record, dict):
        raise damaged(path, f"a {type(record).__name__} in the place of a record", remedy)
    own = record.pop("checksum", None)
    # all that was added since there are checksums: without one it was removed
    wrong = own != seal(record) if own is not None else bool(record.keys() & {*more})
    if wrong:
        raise damaged(path, "its checksum is another", remedy)
    if odd := sorted((record.keys() ^ {*needed}) - {*more}):
        raise damaged(path, f"it lacks, or has too many: {', '.join(odd)[:100]}", remedy)
    return record


def read_figures(path, remedy="restore it from a copy"):
    """What was measured when a phase ended: a dict with loss, cr and heads. Raises InputError."""
    record = read_sealed(path, FIGURES, remedy=remedy)
    heads = record["heads"]
    rows = isinstance(heads, list) and heads and all(isinstance(row, list) for row in heads)
    if not (is_number(record["loss"]) and is_number(record["cr"], 0) and rows and len(heads[0])
            and all(len(row) == len(heads[0]) and all(is_number(cr, 0) for cr in row)
                    for row in heads)):
        raise damaged(path, "no figures", remedy)
    return record


def read_choice(folder, config, remedy):
    """The Choice of the control channels of a model with this Config. Raises InputError."""
    path = folder / CHOICE
    record = read_sealed(path, {"pair", "degrees"}, remedy=remedy)
    pair, rows = record["pair"], record["degrees"]
    if not (is_number(pair, 0, config.head_dim // 2 - 1, int) and isinstance(rows, list)
            and len(rows) == config.n_layer and all(
                isinstance(row, list) and len(row) == config.n_kv_head
                and all(is_number(x, 0, 179, int) for x in row) for row in rows)):
        raise damaged(path, "no choice for this model", remedy)
    return Choice(pair, rows)


def read_state(path, phases, remedy):
    """How far a run got: a dict, see runs.Run.save_state. Raises InputError where it cannot be."""
    state = {"files": None, "curve": None} | read_sealed(
        path, STATE, {"files", "curve"}, remedy)
    phase, step, tensors, files = (state[key] for key in ("phase", "step", "tensors", "files"))
    possible = is_number(phase, 0, len(phases), int) and (
        step == 0 if phase == len(phases) else is_number(step, 0, phases[phase].steps, int))
    named = tensors is None and step == 0 or tensors == f"state-{phase}-{step}"
    sums = files is None or isinstance(files, dict) and all(
        isinstance(x, str) for x in files.values())
    if not (possible and is_number(step, 0, kind=int) and named and sums
            and is_number(state["seconds"], 0, 1e12)):
        raise damaged(path, "no state of this run", remedy)
    return state


# ---------------------------------------------------------------------------------------- the curve

def read_curve(path, remedy="restore it from a copy", limit=None):
    """The entries of metrics.jsonl, a line each; a last one that a kill cut short is left out.

    limit: read no more than these first lines. Raises InputError where a line is none.
    """
    path, entries = Path(path), []
    content = read_bytes(path, 2 ** 34) if path.exists() else b""
    # a power cut may leave zeros where the end was
    lines = content.rstrip(b"\0").split(b"\n")
    for number, line in enumerate(lines[:-1][:limit], 1):
        try:
            entry = json.loads(line)
            sound = (all(is_number(entry[key], 0, kind=int) for key in ("index", "step"))
                     and is_number(entry["loss"]) and isinstance(entry["phase"], str)
                     and all(entry[key] is None or is_number(entry[key], 0)
                             for key in ("cr", "target_cr")) and heads_of(entry)
                     and all(is_number(entry.get(key, 0))
                             for key in ("kl", "tokens_per_second")))
        except (KeyError, RecursionError, TypeError, ValueError):
            sound = False
        if not sound:
            if number == len(lines) - 1 and not content.endswith(b"\n"):
                break                                   # the line before the zeros
            raise damaged(path, f"line {number} is no entry", remedy)
        entries.append(entry)
    return entries


def heads_of(entry):
    """Whether an entry has a CR, and one of each layer and head; or none of each."""
    if "heads" not in entry:
        return True
    rows = entry["heads"]
    return (entry["cr"] is not None and min(map(len, rows)) == max(map(len, rows)) > 0
            and all(is_number(cr, 0) for row in rows for cr in row))


def read_summary(path, remedy="restore it from a copy"):
    """A finished run's summary.json. Raises InputError where it is damaged."""
    summary = read_json(path)
    try:
        sound = (is_number(summary["pretrained"]) and is_number(summary.get("control", 0))
                 and isinstance(summary["unit"], str)
                 and is_number(summary["settings"]["retrofit_steps"], 0, kind=int)
                 and len(summary["dmc"]) > 0 and all(
                     is_number(entry[key], low) for entry in summary["dmc"]
                     for key, low in (("cr", 1), ("target", 1), ("loss", -math.inf),
                                      ("pooling", -math.inf))))
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise damaged(path, "no summary of a run", remedy)
    return summary


def curve_until(path, phases, index, step, remedy, checksum=None):
    """The text of metrics.jsonl up to a step of a phase, and its entries.

    checksum: CRC-32 of that text, where it is known. Raises InputError where steps are missing.
    """
    expected = [(i, n) for i, phase in enumerate(phases[:index]) for n in range(phase.steps)]
    expected += [(index, n) for n in range(step)]
    entries = read_curve(path, remedy, len(expected))
    for number, place in enumerate(expected):
        if number == len(entries) or (entries[number]["index"], entries[number]["step"]) != place:
            phase = phases[place[0]]
            raise damaged(path, f"step {place[1] + 1} of {phase.title} is missing in line "
                          f"{number + 1}", remedy)
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    if checksum is not None and zlib.crc32(text.encode()) != checksum:
        raise damaged(path, "its lines up to the saved state are not those that were written",
                      remedy)
    return text, entries
