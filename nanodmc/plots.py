"""Every picture that the project draws, with matplotlib where it is installed."""

import itertools

import numpy as np

from nanodmc.cli import installing
from nanodmc.files import InputError, write_atomically, write_json
from nanodmc.phases import plan
from nanodmc.records import damaged, read_curve, read_summary
from nanodmc.resumed import read_run
from nanodmc.tables import averaged


def new_figure(width, height):
    """A matplotlib figure, in inches; None where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path, dpi):
    """Write a figure as the picture that its path names, whole or not at all. Raises InputError."""
    write_atomically(path, lambda f: figure.savefig(f, dpi=dpi))


def as_label(name):
    """The name of a file or of a model, as matplotlib may draw it: no formula, no odd character.

    A legend leaves out what begins with an underscore, so such a name gets a blank in front.
    """
    text = str(name).encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


# ---------------------------------------------------------------------------------------- a run

def plot_runs(folders):
    """Draw runs side by side, as plot.png in the first one's folder; see `plot_run`.

    Of each finished run also its loss against its memory, as memory.png in its folder, and of two
    or more that have a control, their losses against their CRs: see `plot_ratios`. Raises
    InputError without matplotlib, or where a run has no step with decisions yet.
    """
    figure = new_figure(6.4 * len(folders), 15)
    if figure is None:
        raise InputError("--plot needs matplotlib, which is not installed; "
                         f"{installing('matplotlib')}.")
    grid = figure.subplots(4, len(folders), squeeze=False,
                           sharey="row" if len(folders) > 1 else False)
    for folder, axes in zip(folders, grid.T, strict=True):
        plot_run(figure, axes, folder)
    save(figure, folders[0] / "plot.png", 110)
    print(f"{folders[0] / 'plot.png'} shows {len(folders)} run{'s' * (len(folders) > 1)}.")
    finished = {folder: read_summary(folder / "summary.json") for folder in folders
                if (folder / "summary.json").exists()}
    controlled = {folder: summary for folder, summary in finished.items() if "control" in summary}
    for folder, summary in finished.items():
        plot_memory(summary, folder / "memory.png")
        print(f"{folder / 'memory.png'} shows its loss against its memory.")
    if len(controlled) > 1:
        plot_ratios(controlled, folders[0] / "ratios")
        print(f"{folders[0] / 'ratios.png'} shows their losses against their CRs, and ratios.json "
              "has the figures.")


def plot_run(figure, axes, folder):
    """Losses, CRs, and the CR of each layer and head (the paper's figures 6 and 7), on 4 axes."""
    path = folder / "metrics.jsonl"
    entries = read_curve(path)
    decided = [e for e in entries if "heads" in e]
    settings = read_run(folder)["settings"]
    if not decided and settings.variant != "gqa":
        raise InputError(f"{path} has no step with decisions yet; let the run get to its retrofit.")
    starts = [phase.position for phase in plan(settings)]
    shapes = {np.shape(e["heads"]) for e in decided}             # of one model, one
    if any(e["index"] >= len(starts) for e in entries) or len(shapes) > 1:
        raise damaged(path, "it is no curve of this run")
    plot_curves(axes[0], axes[1], entries, starts)
    axes[0].set_title(as_label(folder))
    if not decided:
        axes[2].set_axis_off()
        axes[3].set_axis_off()
        return
    plot_layers(figure, axes[2], [e for e in decided if e["phase"] == "retrofit"] or decided)
    plot_heads(figure, axes[3], decided[-1])


def plot_curves(losses, ratios, entries, starts):
    """The running mean loss of every phase; the target CR and the one reached where there are any.

    starts: where in the data each phase begins, in steps. So phases that start from the same
    weights start at the same place.
    """
    for index in sorted({e["index"] for e in entries}):
        part = [e for e in entries if e["index"] == index]
        steps = starts[index] + np.array([e["step"] for e in part])
        width = max(1, len(part) // 25)
        mean = np.convolve([e["loss"] for e in part], np.ones(width) / width, mode="valid")
        name, colour = part[0]["phase"], f"C{index}"
        if name == "solidify":
            name += f" {part[0]['target_cr']:g}"
        losses.plot(steps[width - 1:], mean, colour, label=name)
        if part[0]["target_cr"]:
            ratios.plot(steps, [e["cr"] for e in part], colour, lw=0.8, label=name)
            ratios.plot(steps, [e["target_cr"] for e in part], colour, ls="--", lw=1.5)
    losses.set(ylabel="LM loss, running mean")
    ratios.set(xlabel="step", ylabel="CR; dashed: target")
    for axis in (losses, ratios):
        if axis.lines:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)


def draw_ratios(figure, axis, values, label):
    """A matrix of CRs as colours, on a logarithmic scale that is the same in every plot."""
    image = axis.imshow(np.array(values), aspect="auto", origin="lower", norm="log",
                        cmap="magma_r", interpolation="nearest")
    image.set_clim(1, 64)
    bar = figure.colorbar(image, ax=axis, label=label, ticks=[1, 2, 4, 8, 16, 32, 64])
    bar.ax.set_yticklabels(["1", "2", "4", "8", "16", "32", "64"])
    bar.ax.minorticks_off()


def plot_layers(figure, axis, entries):
    """Figure 7: the CR of each layer (row) as the CR of the whole model grows (columns)."""
    layers = np.array([1 / (1 / np.array(e["heads"])).mean(1) for e in entries]).T
    draw_ratios(figure, axis, layers, "CR of a layer")
    shown = np.linspace(0, len(entries) - 1, min(8, len(entries)))
    shown = np.unique(shown.round().astype(int))
    axis.set_xticks(shown, [f"{entries[i]['cr']:.2f}" for i in shown])
    axis.set(xlabel="CR of the whole model as the retrofit goes on", ylabel="layer")
    axis.yaxis.get_major_locator().set_params(integer=True)


def plot_heads(figure, axis, entry):
    """Figure 6: the CR of each layer (row) and head (column).

    Heads are sorted within a layer, since their order means nothing.
    """
    draw_ratios(figure, axis, np.sort(entry["heads"], axis=1)[:, ::-1], "CR of a head")
    axis.set(xlabel=f"heads of a layer, from the most compressed; {entry['phase']} at CR "
                    f"{entry['cr']:.2f}", ylabel="layer")
    for locator in (axis.xaxis.get_major_locator(), axis.yaxis.get_major_locator()):
        locator.set_params(integer=True)


# -------------------------------------------------------------------------------------- figures

def plot_memory(summary, path):
    """Loss against memory: DMC, and averaging without learning, from a run's summary.json.

    The loss is above the control's. Without a control it is the loss itself, since nobody knows
    then what training on the text does alone. Returns whether matplotlib is there.
    """
    figure = new_figure(4.3, 2.8)
    if figure is None:
        return False
    controlled = "control" in summary
    base, start = (summary["control"], 0.0) if controlled else (0.0, summary["pretrained"])
    entries = sorted(summary["dmc"], key=lambda entry: entry["cr"])
    axes = figure.subplots()
    draw_policy(axes, "every n tokens averaged", "C1s--", -14,
                [(averaged(e["target"]), e["pooling"] - base) for e in entries], start)
    draw_policy(axes, "DMC", "C0o-", 7, [(e["cr"], e["loss"] - base) for e in entries], start)
    axes.set_xlabel("share of the cache kept (%)", fontsize=9)
    what = "loss above the control model's" if controlled else "loss"
    axes.set_ylabel(f"{what}\n(nats per {summary['unit']})", fontsize=9)
    axes.set_xlim(0, 104)
    axes.tick_params(labelsize=8)
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path, 150)
    return True


def draw_policy(axes, name, style, below, points, start):
    """A line from the whole cache, whose loss is `start`, to each (CR, loss), with labels."""
    shares = [100, *(100 / cr for cr, _ in points)]
    axes.plot(shares, [start, *(loss for _, loss in points)], style, label=name, markersize=5)
    text = {"fontsize": 8, "color": style[:2], "textcoords": "offset points", "ha": "center"}
    for share, (cr, loss) in zip(shares[1:], points, strict=True):
        axes.annotate(f"{cr}x" if isinstance(cr, int) else f"{cr:.1f}x", (share, loss), (0, below),
                      **text)
    axes.annotate(f"{loss:.2f}" if start else f"{loss:+.2f}", (share, loss), (-20, -3), **text)


def plot_ratios(summaries, path):
    """Figures 13 to 15: loss above the control's against CR, as path.png and path.json.

    summaries: summary.json of each run, which is a line, by its folder.
    """
    lines = {}
    for folder, summary in summaries.items():
        steps = summary["settings"]["retrofit_steps"]
        name = f"{folder}: {summary.get('variant', 'DMC')}, {steps:,} steps of retrofit"
        lines[name] = sorted((e["cr"], e["loss"] - summary["control"]) for e in summary["dmc"])
    write_json(f"{path}.json", {"cr, loss above the control's": lines})
    figure = new_figure(6.4, 4)
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip((1.0, 0.0), *points, strict=True), marker="o", markersize=4,
                  label=as_label(name))
    axes.set(xlabel="compression ratio", ylabel="loss above the control's, nats")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
    save(figure, f"{path}.png", 130)


def plot_analyses(facts, path):
    """Figures 6, 8, 9 and 12 of what nanodmc/analyses.py finds. Returns whether it could draw."""
    figure = new_figure(10, 7)
    if figure is None:
        return False
    (heads, words), (length, position) = figure.subplots(2, 2)
    (ratios,), (agreement,) = facts["figure 6"].values(), facts["figure 12"].values()
    draw_ratios(figure, heads, ratios, "CR")
    heads.set(title="compression of each layer and head", xlabel="head", ylabel="layer")
    image = words.imshow(agreement, aspect="auto", origin="lower", cmap="RdBu", vmin=-1, vmax=1)
    figure.colorbar(image, ax=words, label="correlation")
    words.set(title="slots that begin where words do", xlabel="head", ylabel="layer")
    for axis in (heads, words):
        for locator in (axis.xaxis.get_major_locator(), axis.yaxis.get_major_locator()):
            locator.set_params(integer=True)
    (points,), (ranges,) = facts["figure 8"].values(), facts["figure 9"].values()
    lengths, crs, errors = zip(*points, strict=True)
    length.errorbar(lengths, crs, [error or 0 for error in errors], marker="o", capsize=3)
    length.set(title="the longer, the more compressed?", xscale="log", ylabel="CR so far",
               xlabel="tokens so far")
    position.step([a for a, *_ in ranges], [mean for *_, mean in ranges], where="post")
    position.set(title="merges by position", xlabel="position", ylabel="mean alpha", ylim=(0, 1))
    for axis in (length, position):
        axis.grid(alpha=0.3)
    save(figure, path, 110)
    return True


def plot_comparison(rows, text, path):
    """Loss against memory, a line for each method, from the plain model's whole cache on.

    rows, text: as `generate.py --compare` writes them. Loss is in nats per token, or per byte where
    tokenizers differ. Bars are standard errors of the difference to the plain model, which read the
    same text. Returns whether matplotlib is there.
    """
    figure = new_figure(6.4, 4)
    if figure is None:
        return False
    axes = figure.subplots()
    unit = "token" if text["same_tokenizer"] else "byte"
    scale = lambda row: row[f"nats_per_{unit}"] / row["nats_per_token"]
    point = lambda row: (row["cache_bytes"] / 1000, row[f"nats_per_{unit}"],
                         (row["above_plain_stderr"] or 0.0) * scale(row))
    arguments = list(dict.fromkeys(row["argument"] for row in rows))
    for number, method in enumerate(dict.fromkeys((r["argument"], r["method"]) for r in rows)):
        mine = [row for row in rows if (row["argument"], row["method"]) == method]
        label = method[1] if len(arguments) == 1 else f"{method[0]}: {method[1]}"
        plain = [r for r in rows if (r["argument"], r["method"]) == (method[0], "plain")]
        if method[1] == "plain":
            for row in mine:
                axes.annotate(as_label(row["name"]), point(row)[:2], (-5, 5), ha="right",
                              fontsize=7, textcoords="offset points")
        else:
            mine = sorted(plain[-1:] + mine, key=lambda row: -row["cache_bytes"])
        x, y, bars = zip(*map(point, mine), strict=True)
        axes.errorbar(x, y, bars, label=as_label(label), marker="o", markersize=4, capsize=2,
                      linewidth=1.2, elinewidth=0.7, color=f"C{number % 10}",
                      linestyle="none" if method[1] == "plain" else "-")
    axes.set_xlabel(f"cache in use after {text['context']:,} tokens or the text's end, mean (kB)")
    axes.set_ylabel(f"nats per {unit}; bars: standard error\nof the difference to the plain model")
    axes.set_title(as_label(text["name"]), fontsize=9)
    axes.set_xlim(0, None)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path, 150)
    return True


def plot_bench(rows, path):
    """Figure 5: tokens/s by CR, at the largest batch and at that of CR 1.

    rows: as `generate.py --bench` writes them, CR 1 first. Returns whether matplotlib is there.
    """
    figure = new_figure(6, 3.5)
    if figure is None:
        return False
    axes = figure.subplots()
    for kind in dict.fromkeys(row["kind"] for row in rows if row["kind"] != "peer"):
        points = [(row["cr"], row["tokens_per_second"]) for row in rows
                  if row["kind"] == kind or (row is rows[0] and kind == "batch of CR 1")]
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
    peers = [row for row in rows if row["kind"] == "peer"]
    for row, style in zip(peers, itertools.cycle(("--", ":", "-.")), strict=False):
        axes.axhline(row["tokens_per_second"], color="grey", linestyle=style, linewidth=1,
                     label=f"{row['name']}, batch {row['batch']}")
    axes.set(xlabel="compression ratio", ylabel="tokens per second", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    save(figure, path, 150)
    return True
