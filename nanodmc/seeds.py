"""Comparisons that were measured at several seeds, put together: means and spread of each row."""

from pathlib import Path
from statistics import fmean

from nanodmc.cli import provenance, wrapped
from nanodmc.comparison import in_columns
from nanodmc.files import InputError, is_number, listed, read_json, write_json, write_text

NAMES = "name", "model", "argument", "method"
NUMBERS = "cr", "nats_per_byte", "cache_bytes"
NAME, WIDTHS = 32, (10, 10, 9, 19)       # columns of the table


def is_comparison(argument):
    """Whether an argument of --compare is the result of an earlier one, rather than a model."""
    return argument.endswith(".json") and Path(argument).is_file()


def is_row(value):
    """Whether a value from JSON has what is needed here of a comparison's row."""
    return (isinstance(value, dict) and all(isinstance(value.get(key), str) for key in NAMES)
            and all(is_number(value.get(key), 0) for key in NUMBERS))


def read_rows(path):
    """The rows of a comparison by their names, without the folders above a run or model.

    So the rows of SEED/dmc-4 meet from seed to seed. Raises InputError.
    """
    if not is_comparison(str(path)):
        raise InputError(f"{path} is no result of --compare, and others are; compare results with "
                         "results, or models with models.")
    facts = read_json(path)
    rows = facts.get("rows") if isinstance(facts, dict) else None
    sound = isinstance(rows, list) and all(map(is_row, rows))
    if not rows or not sound:
        raise InputError(f"{path} holds no rows of --compare; give what its --out wrote.")
    named = {}
    for row in rows:
        if named.setdefault(short(row), row) is not row:
            raise InputError(f"{path} has two rows called {short(row)} without the folders above; "
                             "give the last folders of its --compare different names.")
    return named


def short(row):
    """A row's name with the last part of its argument in the place of the whole."""
    return row["name"].replace(row["argument"], Path(row["argument"]).name, 1)


def reference(rows):
    """The name of the row that the others are compared with: a control, or else a plain model."""
    plain = [name for name, row in rows.items() if row["method"] == "plain"]
    controls = [name for name in plain if rows[name]["model"].endswith("control")]
    return next(iter(controls or plain), None)


def combined(paths):
    """A row for each name: mean, least and most over the files, of the loss and of its distance.

    paths: each file once. Raises InputError where the files do not hold the same rows.
    """
    files = {path: read_rows(path) for path in paths}
    first, *others = files
    names = list(files[first])
    for path in others:
        if odd := set(names) ^ set(files[path]):
            raise InputError(f"{first} and {path} do not compare the same: only one of them has "
                             f"{listed(sorted(odd))}; give comparisons of the same things.")
    base = reference(files[first])
    if base is None:
        raise InputError(f"{first} has no plain model to compare with; add it to its --compare.")
    for name in names:
        rows = [rows[name] for rows in files.values()]
        above = [rows[name]["nats_per_byte"] - rows[base]["nats_per_byte"]
                 for rows in files.values()]
        yield {"name": name, "method": rows[0]["method"], "base": base,
               "cr": [row["cr"] for row in rows],
               "cache_bytes": fmean(row["cache_bytes"] for row in rows),
               "nats_per_byte": [row["nats_per_byte"] for row in rows],
               "above": above, "mean_above": fmean(above)}


def cells(row):
    """What the tables have of a row, as texts: its name, CR, loss, distance, and the range."""
    low, high = (f"{f(row['cr']):.2f}" for f in (min, max))
    return (row["name"], low if low == high else f"{low}-{high}",
            f"{fmean(row['nats_per_byte']):.4f}", f"{row['mean_above']:+.4f}",
            f"{min(row['above']):+.4f} to {max(row['above']):+.4f}")


def combine(paths, out):
    """Print the table of comparisons at several seeds; out: write FILE.json and FILE.md too."""
    files = {}
    for path in paths:
        files.setdefault(Path(path).resolve(), path)             # each once
    paths = list(files.values())
    rows, facts = list(combined(paths)), provenance()
    heads = "", "CR", "nats/byte", "above", "least to most"
    print("\n".join(in_columns([heads, *map(cells, rows)], NAME, WIDTHS)))
    note = (f"Means over {len(paths)} files. above: {rows[0]['base']}, in nats per byte, the "
            "mean and its range.")
    print("\n" + wrapped(note))
    if out:
        lines = ["| " + " | ".join(texts) + " |" for texts in [heads, *map(cells, rows)]]
        page = "\n".join([lines[0], "|---|" + "--:|" * 4, *lines[1:], "", note, ""])
        write_json(out, {"rows": rows, "files": paths, **facts})
        write_text(out.with_suffix(".md"), page)
