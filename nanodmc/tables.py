"""What a run shows on the terminal: opening lines, log lines, the final table and a heat map.

No line is wider than 79 columns.
"""

import math
import textwrap

WIDTH = 79
LOG_HEAD = (f"{'phase':<12}{'step':>8}{'loss':>11}{'target':>7}{'CR':>7}{'lr':>8}{'tok/s':>8}"
            f"{'MFU':>5}{'GB':>6}{'left':>7}")


def show(text, name=""):
    """Print a line that opens a run, wrapped, with its name in a column before it.

    A no-break space keeps what stands around it on one line, and comes out as a space.
    """
    indent = " " * 10 if name else ""
    lines = textwrap.fill(f"{name:<{len(indent)}}{text}", WIDTH, subsequent_indent=indent,
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


def duration(seconds):
    """Seconds as 4:05 (minutes), 4h05m, 4d05h or 104d; None as -."""
    if seconds is None:
        return "-"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes}:{int(seconds) % 60:02}"
    if minutes < 48 * 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days}d{hours:02}h" if days < 100 else f"{days}d"


def table(summary):
    """The final table: validation losses, and their distance to the control.

    Where there was no control, to the pretrained model. Losses are in nats per byte or token.
    """
    baseline = "control" if "control" in summary else "pretrained"
    rows = [("pretrained", 1.0, summary["pretrained"])]
    if "control" in summary:
        rows.append(("control, trained on without compression", 1.0, summary["control"]))
    for entry in summary["dmc"]:
        every = round(entry["cr"])
        rows.append((f"DMC {entry['target']:g}x", entry["cr"], entry["loss"]))
        rows.append((f"{baseline}, every {every} tokens averaged", float(every), entry["pooling"]))
    lines = [f"\n{'validation, through the cache':<42}{'CR':>6}{'nats/' + summary['unit']:>11}"
             f"{'to ' + baseline:>14}"]
    lines += [f"{name:<42}{cr:6.2f}{loss:11.4f}{loss - summary[baseline]:+14.4f}"
              for name, cr, loss in rows]
    return "\n".join(lines)


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
