"""Everything that is compared with DMC side by side: one held-out text, through real caches."""

import math
import time
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dmc import wide
from nanodmc.checkpoint import load
from nanodmc.claim import check_folder
from nanodmc.cli import OPS, provenance, wrapped
from nanodmc.comparison import Progress, about, markdown, table
from nanodmc.contenders import ONE_BY_ONE, Subject, all_cases, held_out
from nanodmc.files import InputError, write_json, write_text
from nanodmc.heldout import chosen, pieces
from nanodmc.history import history
from nanodmc.locks import only_writer
from nanodmc.machine import fast_model
from nanodmc.plots import plot_comparison
from nanodmc.seeds import combine, is_comparison

TOKENS = 16_384        # of the held-out text, unless --tokens says so


# ------------------------------------------------------------------------------------- measuring

class Measured(NamedTuple):
    """Of each piece, in the order of the pieces; fp64."""

    nats: torch.Tensor       # summed over its tokens
    kl: torch.Tensor         # KL(given model || this one), the same; of no given model, 0
    slots: torch.Tensor      # summed over layers and heads
    padded: torch.Tensor     # the same, where all heads of a layer are as long as the longest
    allocated: float | None  # bytes, summed over the pieces
    seconds: float


class Given(NamedTuple):
    """What is left of a model when it has read the Pieces: enough for its distributions."""

    lm_head: torch.nn.Module
    hidden: dict             # number of a piece -> (tokens, dim)


@torch.no_grad()
def measure(model, case, cut, each=lambda tokens: None, given=None, kept=None):
    """Take Pieces through a case's cache, those of one length together. Returns Measured.

    each: is called after each batch with the tokens in it. given: a Given to measure the divergence
    from. kept: a dict that takes the hidden states of each piece by its number.
    """
    weight, began = model.lm_head.weight, time.perf_counter()
    figures, allocated = torch.zeros(4, len(cut), dtype=torch.float64), []
    length = lambda i: len(cut[i].ids) - 1
    for tokens, same in groupby(sorted(range(len(cut)), key=length, reverse=True), key=length):
        make, same, rows = case.make_cache(model, tokens), list(same), max(1, 4096 // tokens)
        for part in (same[i:i + rows] for i in range(0, len(same), rows)):
            ids = torch.tensor([cut[i].ids for i in part], device=weight.device)
            cache = make(model.config, len(part), weight.device, weight.dtype)
            hidden, _ = model.hidden(ids[:, :-1], cache)
            if kept is not None:
                kept.update(zip(part, hidden, strict=True))
            known = given and (given.lm_head, torch.stack([given.hidden[i] for i in part]))
            figures[:2, part] = costs(model.lm_head, ids[:, 1:], hidden, known).cpu()
            lengths = cache.lengths.double().cpu()                           # (L, B, G)
            figures[2, part] = lengths.sum((0, 2))
            figures[3, part] = lengths.amax(2).sum(0) * lengths.size(2)
            if hasattr(cache, "bytes"):
                allocated.append(cache.bytes.allocated)
            del cache
            each(tokens * len(part))
    return Measured(*figures, sum(allocated) if allocated else None, time.perf_counter() - began)


def costs(lm_head, y, hidden, given=None, chunk=2048):
    """What the tokens y (B, T) cost, and KL(given || model), summed over T: (2, B), fp64.

    hidden (B, T, dim): of the tokens before them. given: another model's lm_head and hidden, or
    None, for which the divergence is 0. The logits of `chunk` tokens are made at a time.
    """
    steps, total = max(1, chunk // len(y)), torch.zeros(2, len(y), dtype=torch.float64,
                                                        device=y.device)
    for start in range(0, y.size(1), steps):
        part = slice(start, start + steps)
        ours = wide(lm_head(hidden[:, part])).log_softmax(-1)
        total[0] += F.nll_loss(ours.transpose(1, 2), y[:, part], reduction="none").double().sum(1)
        if given:
            theirs = wide(given[0](given[1][:, part])).log_softmax(-1)
            parts = F.kl_div(ours, theirs, reduction="none", log_target=True)
            total[1] += parts.sum(-1).double().sum(1)
    return total


def ratio_and_error(amounts, sizes):
    """sum(amounts) / sum(sizes), and its standard error over the units; None for a single unit.

    The residuals are amount - ratio * size, since both differ between units. For units of one size
    it is the standard error of their mean.
    """
    n, ratio = len(amounts), amounts.sum() / sizes.sum()
    if n < 2:
        return ratio.item(), None
    squares = ((amounts - ratio * sizes) ** 2).sum()
    return ratio.item(), (math.sqrt(n / (n - 1) * squares.item()) / sizes.sum()).item()


def by_unit(x, cut):
    """Figures of pieces summed over each document; of a single document, as they are."""
    number = torch.tensor([piece.document for piece in cut])
    if number.max() == number.min():
        return x
    _, number = number.unique(return_inverse=True)
    return torch.zeros(int(number.max()) + 1, dtype=x.dtype).index_add(0, number, x)


def row_of(case, cut, measured, itemsize, plain=None, taught=False):
    """A row of the comparison, a dict.

    itemsize: bytes of a number in the cache. plain: the nats of each piece by the plain model that
    the case is compared with, or None. taught: whether there is a given model to be close to.
    """
    config, double = case.config, torch.float64
    heads = case.heads or config.n_kv_head
    tokens = torch.tensor([len(piece.ids) - 1 for piece in cut], dtype=double)
    sizes = torch.tensor([piece.bytes for piece in cut], dtype=double)
    over = lambda amounts, parts: ratio_and_error(by_unit(amounts, cut), by_unit(parts, cut))
    (loss, error), (per_byte, byte_error) = (over(measured.nats, x) for x in (tokens, sizes))
    above = over(measured.nats - plain, tokens) if plain is not None else (None, None)
    kl = over(measured.kl, tokens) if taught else (None, None)
    count = tokens.sum().item()
    slots, full = measured.slots.sum().item(), count * config.n_layer * heads
    mean_bytes = slots * 2 * config.head_dim * itemsize / len(cut)
    return {
        "name": case.name, "model": str(case.folder), "argument": case.argument,
        "method": case.method, "asked_cr": case.cr, "cr": full / slots,
        "padded_cr": full / measured.padded.sum().item(),
        "nats_per_token": loss, "stderr": error,
        "nats_per_byte": per_byte, "stderr_per_byte": byte_error,
        "above_plain": above[0], "above_plain_stderr": above[1],
        "kl_from_given": kl[0], "kl_from_given_stderr": kl[1],
        "cache_bytes": mean_bytes, "cache_bytes_per_token": mean_bytes * len(cut) / count,
        "allocated_bytes": measured.allocated and measured.allocated / len(cut),
        "tokens": int(count), "tokens_per_second": count / measured.seconds}


# ------------------------------------------------------------------------------------- --compare

def checked_out(out):
    """Raise InputError where --out cannot take a comparison. Writes nothing."""
    if out.suffix != ".json":
        raise InputError(f"--out {out} is no name for a comparison; let it end with .json.")
    if taken := [path for path in map(out.with_suffix, (".json", ".md", ".png")) if path.exists()]:
        raise InputError(f"{taken[0]} is there already; choose another --out, or remove it.")
    check_folder(out.parent)


@contextmanager
def sole_writer(out):
    """Nobody else writes to `out`, if that is given and was checked. Raises InputError as above."""
    if not out:
        yield
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        checked_out(out)                 # another one may have come to its end
        yield


class Comparison:
    """The rows so far, and where they go. Raises InputError where nothing can be compared.

    arguments, policies, ratios, data, tokens, out: as the flags of generate.py; policies a list.
    """

    def __init__(self, arguments, policies, ratios, data, tokens, out):
        subjects = [Subject(argument) for argument in dict.fromkeys(arguments)]
        self.cases = all_cases(subjects, policies, ratios)
        self.context = min(subject.context for subject in subjects)
        self.out, self.rows = out, []
        texts, name = held_out(subjects, data, "--compare of models without a run")
        self.texts = chosen(texts, subjects[0].tokenizer, tokens or TOKENS, self.context)
        self.cut = {subject.argument: pieces(self.texts, subject.tokenizer, self.context)
                    for subject in subjects}
        vocabularies = {subject.tokenizer.files["tokenizer.json"] for subject in subjects}
        self.text = {
            "name": name, "documents": len(self.texts),
            "tokens": sum(len(piece.ids) - 1 for piece in self.cut[subjects[0].argument]),
            "bytes": sum(len(text.encode()) for text in self.texts), "context": self.context,
            "stderr_over": "documents" if len(self.texts) > 1 else "pieces of one document",
            "same_tokenizer": len(vocabularies) == 1}
        self.facts = {"training": {
            subject.argument: history(Path(subject.argument), subject.settings, ONE_BY_ONE)
            for subject in subjects if subject.settings}, **provenance()}
        # one folder may be given by several names
        self.plain = {subject.argument: subject.plain[1].resolve() for subject in subjects
                      if subject.plain}
        self.first = {subject.argument: subject.models[0][1].resolve() for subject in subjects
                      if subject.models[0][3] == "plain"}       # the model given

    def run(self, ops, device):
        """Measure all Cases, and write what there is after each."""
        progress = Progress(len(self.cases), self.text["tokens"])
        model, loaded, nats_of, given = None, None, {}, {}
        for number, case in enumerate(self.cases):
            if loaded != case.folder:
                model, loaded = None, case.folder                 # one model in memory at a time
                model = fast_model(load(case.folder, ops, device))
            cut = self.cut[case.argument]
            progress.begin(case, self.cases[number + 1:])
            first, folder = self.first.get(case.argument), case.folder.resolve()
            hidden = {} if case.method == "plain" and folder == first else None
            measured = measure(model, case, cut, progress.add, given.get(first), hidden)
            if case.method == "plain":
                nats_of[folder] = measured.nats
            if hidden:
                given[first] = Given(model.lm_head, hidden)
            plain = nats_of.get(self.plain.get(case.argument))
            self.rows.append(row_of(case, cut, measured, model.lm_head.weight.itemsize, plain,
                                    taught=first in given))
            progress.end()
            self.write()
        progress.clear()

    def write(self):
        """The rows so far, as JSON and as Markdown."""
        if not self.out:
            return
        write_json(self.out, {"rows": self.rows, "text": self.text, **self.facts})
        write_text(self.out.with_suffix(".md"), markdown(self.rows, self.text))

    def where(self):
        """Where the rows are, as a sentence."""
        return f" They are in {self.out} and {self.out.with_suffix('.md')}." if self.out else ""


def compare(args, device):
    """--compare: a row for each model, and for its plain model with every policy at every CR.

    Or of results of earlier comparisons: the means of their rows.

    args: compare, policy (names with commas between, or None), cr, data, tokens, out, ops. Raises
    InputError.
    """
    if args.out:
        checked_out(args.out)
    if any(map(is_comparison, args.compare)):
        with sole_writer(args.out):
            combine(args.compare, args.out)
        return
    policies = None if args.policy is None else [p for p in args.policy.split(",") if p]
    ratios = args.cr or [2.0, 4.0, 8.0]
    done = Comparison(args.compare, policies, ratios, args.data, args.tokens, args.out)
    with sole_writer(args.out):
        print(wrapped(about(done.text)) + "\n")
        carry_out(done, args.out, OPS[args.ops], device)


def carry_out(done, out, ops, device):
    """Measure a Comparison, and show what came out, also after Ctrl-C."""
    text = done.text
    try:
        done.run(ops, device)
    except KeyboardInterrupt:
        print("\n" + table(done.rows, text) if done.rows else "")
        print(wrapped(f"Stopped. {len(done.rows)} of {len(done.cases)} rows are done."
                      + done.where() * bool(done.rows)))
        raise
    print(table(done.rows, text))
    said = done.where()
    if out:
        picture = out.with_suffix(".png")
        drawn = plot_comparison(done.rows, text, picture)
        said += f" {picture} is the plot." if drawn else ""
    if said:
        print("\n" + wrapped(said.strip()))
