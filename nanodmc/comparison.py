"""How a comparison is shown: its table on the terminal and in Markdown, and its progress."""

import time
from collections import defaultdict

from nanodmc.cli import wrapped
from nanodmc.policies import POLICIES
from nanodmc.terminal import ProgressLine, duration, to_show

NAME, WIDTHS = 21, (6, 7, 11, 8, 10, 9, 8)       # columns of the table
GUESS = 2            # times that a policy takes a plain model's time, until one was timed


# ---------------------------------------------------------------------------------------- tables

def size(number):
    """A number of bytes in at most 8 characters."""
    unit = 0 if number < 1000 else 1 if number < 1e6 else 2 if number < 1e9 else 3
    return f"{number / 1000 ** unit:.{min(unit, 1)}f} {('B', 'kB', 'MB', 'GB')[unit]}"


def cells(row):
    """What the table has of a row, as texts, but for its name."""
    error = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
    return (f"{row['cr']:.2f}", f"{row['padded_cr']:.2f}", f"{row['nats_per_token']:.4f}", error,
            f"{row['nats_per_byte']:.4f}", size(row["cache_bytes"]),
            f"{row['tokens_per_second']:,.0f}")


def about(text):
    """A sentence on the text."""
    documents = f"{text['documents']:,} document{'s' * (text['documents'] != 1)}"
    return (f"{text['name']}: {documents}, {text['tokens']:,} tokens, {text['bytes']:,} bytes, in "
            f"pieces of {text['context']:,} tokens at most.")


def notes(text):
    """What a reader of the table has to know, a sentence each."""
    yield (f"+-: standard errors of the nats per token, over the {text['stderr_over']}. padded: "
           "the CR if all heads of a layer were as long as the longest. cache: bytes in use at the "
           "end of a piece of the text, in the mean.")
    if not text["same_tokenizer"]:
        yield ("The tokenizers differ, and so do their tokens: compare nats per byte, not per "
               "token.")


def in_columns(rows, first, widths):
    """Yield rows of texts as lines to print: a name of `first` columns, then columns of `widths`.

    A long name has a line of its own.
    """
    for name, *texts in rows:
        name = to_show(name)
        if len(name) >= first:
            yield name
            name = ""
        yield name.ljust(first) + "".join(
            x.rjust(width) for x, width in zip(texts, widths, strict=True))


def table(rows, text):
    """The rows as lines of at most 80 columns."""
    heads = "", "CR", "padded", "nats/token", "+-", "nats/byte", "cache", "tok/s"
    lines = in_columns([heads, *((row["name"], *cells(row)) for row in rows)], NAME, WIDTHS)
    return "\n".join([*lines, "", *map(wrapped, notes(text))])


def with_error(row, key, sign):
    """A figure of a row with its standard error, or nothing where there is no figure."""
    value, error = row[key], row[f"{key}_stderr"]
    if value is None:
        return ""
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")


def markdown(rows, text):
    """The rows as a table in Markdown: also how much each costs above its plain model, and its
    divergence from the model given."""
    lines = [about(text), "",
             "| | CR | padded CR | nats/token | ± | nats/byte | cache | tokens/s "
             "| above plain, nats/token | KL from given |", "|---|" + "--:|" * 9]
    for row in rows:
        name = row["name"].replace("|", "\\|")
        further = with_error(row, "above_plain", "+"), with_error(row, "kl_from_given", "")
        lines.append("| " + " | ".join([name, *cells(row), *further]) + " |")
    return "\n".join([*lines, "", *notes(text)]).replace("+-:", "±:") + "\n"


# -------------------------------------------------------------------------------------- progress

class Progress(ProgressLine):
    """A line about a comparison.

    What is left follows from the pace of the same method so far: `total` rows of `tokens` each.
    """

    def __init__(self, total, tokens, clock=time.perf_counter):
        super().__init__(clock)
        self.total, self.tokens, self.shown, self.done = total, tokens, clock(), 0
        self.pace = defaultdict(lambda: [0, 0.0])       # of each kind: tokens, seconds

    def begin(self, case, left=()):
        """A case begins; `left` come after it."""
        self.case, self.left, self.taken, self.began = case, left, 0, self.clock()

    def add(self, tokens):
        """So many tokens of the case were taken in. Prints the line, if it is time."""
        now = self.clock()
        pace = self.pace[self.case.method in POLICIES]
        pace[0], pace[1] = pace[0] + tokens, pace[1] + now - self.began
        self.taken, self.began = self.taken + tokens, now
        self.show(now)

    def end(self):
        """A case is done."""
        self.done += 1

    def seconds_left(self):
        """By the pace so far; None before there is any."""
        if not any(seconds for _, seconds in self.pace.values()):
            return None
        per_token = {kind: seconds / tokens for kind, (tokens, seconds) in self.pace.items()}
        slow = per_token.get(True, GUESS * per_token.get(False, 0))
        fast = per_token.get(False, slow / GUESS)
        each = lambda case: slow if case.method in POLICIES else fast
        rest = max(0, self.tokens - self.taken) * each(self.case)
        return rest + sum(self.tokens * each(case) for case in self.left)

    def __str__(self):
        name = self.case.name if len(self.case.name) <= 40 else "..." + self.case.name[-37:]
        facts = [f"{self.done}/{self.total} rows", f"{name} {self.taken / self.tokens:.0%}"]
        if (left := self.seconds_left()) is not None:
            facts.append(f"{duration(left)} left")
        return "  ".join(facts)
