"""What a run shows on the terminal: opening lines, log lines, the final table and a heat map.

No line is wider than 79 columns.
"""

import math
import textwrap
from collections import deque
from statistics import fmean

from nanodmc.terminal import duration, to_show

WIDTH = 79
LOG_HEAD = (f"{'phase':<12}{'step':>8}{'loss':>11}{'target':>7}{'CR':>7}{'lr':>8}{'tok/s':>8}"
            f"{'MFU':>5}{'GB':>6}{'left':>7}")


def show(text, name=""):
    """Print a line that opens a run, wrapped, with its name in a column before it.

    A no-break space keeps what stands around it on one line, and comes out as a space.
    """
    indent = " " * 10 if name else ""
    lines = textwrap.fill(f"{name:<{len(indent)}}{to_show(text)}", WIDTH, subsequent_indent=indent,
                          break_long_words=False, break_on_hyphens=False)
    print(lines.replace("\N{NO-BREAK SPACE}", " "), flush=True)


def log_line(phase, entry, loss, left):
    """An entry of metrics.jsonl as a line. loss: to show in the place of its own. left: seconds."""
    ratios, mfu = f"{'-':>7}{'-':>7}", entry["mfu"]
    if entry["cr"]:
        ratios = f"{entry['target_cr']:7.2f}{entry['cr']:7.2f}"
    return (f"{phase.title:<12}{entry['step'] + 1:>5}/{phase.steps:<5}{loss:8.4f}{ratios}"
            f"{entry['lr']:8.1e}{entry['tokens_per_second']:8,}"
            f"{'-' if mfu is None else f'{mfu:.0%}':>5}{entry['peak_gb']:6.1f}{duration(left):>7}")


class Pace:
    """Seconds per step, with decisions and without: the mean over the latest steps of this sitting.

    The latest ones, so that it follows a machine that others share, and forgets a slow start.
    """
    LATEST = 20

    def __init__(self):
        self.seconds = {}

    def add(self, decided, seconds):
        """A step took so many seconds."""
        self.seconds.setdefault(decided, deque(maxlen=self.LATEST)).append(seconds)

    def per_step(self, decided):
        """Seconds that such a step takes; until one was timed, 1.7 plain ones have decisions."""
        factor = 1.0 if decided in self.seconds else 1.7 if decided else 1 / 1.7
        return fmean(self.seconds.get(decided) or self.seconds[not decided]) * factor

    def left(self, steps):
        """Seconds for what is left: steps with decisions or without, {True: N, False: N}.

        None before the second step: the first one is slow.
        """
        if sum(map(len, self.seconds.values())) < 2:
            return None
        return sum(n * self.per_step(decided) for decided, n in steps.items())


def averaged(target):
    """How many tokens averaging without learning puts into a slot, beside a model of this CR."""
    return max(1, round(target))


def table(summary):
    """The final table: validation losses, and their distance to the control.

    Losses are in nats per byte or token. Without a control there are no distances: what further
    training on the text does by itself is not known then. Warns of targets that were missed.
    """
    controlled, title = "control" in summary, summary.get("variant", "DMC")
    rows = [("pretrained", 1.0, summary["pretrained"])]
    if controlled:
        rows.append(("control, trained on without compression", 1.0, summary["control"]))
    for entry in summary["dmc"]:
        every = averaged(entry["target"])
        rows.append((f"{title} {entry['target']:g}x", entry["cr"], entry["loss"]))
        if every > 1:
            name = f"{'control' if controlled else 'pretrained'}, every {every} tokens averaged"
            rows.append((name, float(every), entry["pooling"]))
    distance = lambda loss: f"{loss - summary['control']:+14.4f}" if controlled else ""
    lines = [f"\n{'validation, through the cache':<42}{'CR':>6}{'nats/' + summary['unit']:>11}"
             + f"{'to control':>14}" * controlled]
    lines += [f"{name:<42}{cr:6.2f}{loss:11.4f}{distance(loss)}" for name, cr, loss in rows]
    notes = [missed(title, entry) for entry in summary["dmc"]]
    if not controlled:
        notes.append("Without a control (--control) nobody knows how much of a difference to "
                     "pretrained comes from training on this text, and how much from DMC.")
    return "\n".join(lines + [textwrap.fill(note, WIDTH, break_on_hyphens=False)
                              for note in notes if note])


def missed(title, entry, tolerance=0.05):
    """A warning where a model of the table misses its target by more than this share, or None."""
    target, cr = entry["target"], entry["cr"]
    if abs(cr / target - 1) <= tolerance:
        return None
    if cr < target:
        way = (f"below {target:g}. Give it more --retrofit-steps, or a larger --cr-weight, "
               "--channel-lr-factor or --lr.")
    else:
        way = f"above {target:g}. Give it more --solidify-steps."
    return f"warning: {title} {target:g}x missed its target: CR {cr:.2f} was reached, {way}"


def heat_map(heads):
    """The CR of every layer (row) and head (column); the darker, the more a head merges.

    More than 12 layers are folded into blocks side by side. Where numbers would take too much room,
    there are only the shades.
    """
    shade = lambda cr: " ░▒▓█"[min(4, int(math.log2(max(cr, 1.0)) + 0.5))]
    layers, gap = len(heads), 3
    fit = lambda width: (WIDTH + gap) // (width + gap)
    if fit(6 + 9 * len(heads[0])) >= (1 if layers <= 12 else 2):
        head = "layer " + "".join(f"{f'head {h}':>9}" for h in range(len(heads[0])))
        cells = ["".join(f" {shade(cr) * 2}{cr:6.1f}" for cr in row) for row in heads]
    else:
        head = "layer heads"
        cells = ["".join(shade(cr) for cr in row) for row in heads]
    rows = [f"{i:5} {row}" for i, row in enumerate(cells)]
    width = max(len(head), len(rows[0]))
    blocks = max(1, min(fit(width), math.ceil(layers / 12)))
    height = math.ceil(layers / blocks)
    lines = [[head] * blocks, *(rows[i::height] for i in range(height))]
    text = ["\nCR of each layer and head (shades: 1, 2, 4, 8, 16 and more)"]
    text += [(" " * gap).join(part.ljust(width) for part in line).rstrip() for line in lines]
    return "\n".join(text)
