"""A file of prompts, answered into a file of results, so that a killed run loses nothing.

A prompt is a line of JSON: {"prompt": "..."}, and where it differs from the flags id, tokens,
temperature, top_k, top_p, seed. Results, as in results.py, come in the order of finishing.
"""

import argparse
import json
import os
import sys
import time
from collections import deque
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from nanodmc.cli import number, typed
from nanodmc.config import dtype_name
from nanodmc.engine import Engine
from nanodmc.files import InputError, one_line, read_text, reason, sync
from nanodmc.parallel import rank_count, this_rank
from nanodmc.pool import pages_that_fit
from nanodmc.requests import Request, Result
from nanodmc.results import as_line, check_results, drop_errors, model_mark
from nanodmc.sampling import derived_seed
from nanodmc.terminal import ProgressLine, duration, to_show

LIMITS = {"tokens": number(1, 2 ** 31 - 1, int), "temperature": number(0, 1e6),
          "top_k": number(0, 2 ** 31 - 1, int), "top_p": number(0, 1),
          "seed": number(0, 2 ** 62, int)}                             # of each setting
LONGEST = 2 ** 24        # bytes of a prompt


# ---------------------------------------------------------------------------- lines of the files

def read_prompt(path):
    """The text in the file that --prompt-file names. Raises InputError."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a pipe or a device, no file; check --prompt-file.")
    if path.is_file() and path.stat().st_size > LONGEST:
        raise InputError(f"{path} has more than {LONGEST:,} bytes; shorten it.")
    return read_text(path, "--prompt-file")


def bounded(file):
    """The lines of a file; of a line that is too long for read_line only the start."""
    while text := file.readline(LONGEST + 2):
        yield text
        while len(text) > LONGEST + 1 and not text.endswith(b"\n"):
            text = file.readline(LONGEST + 2)


def read_line(text):
    """The object in a line of prompts: a dict with a prompt. Raises InputError."""
    if len(text) > LONGEST + 1:
        raise InputError(f"the line has more than {LONGEST:,} bytes; shorten it.")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is no JSON ({one_line(error)}); "
                         "write each prompt as a line of it.") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise InputError('a line is an object with a text as its prompt; write {"prompt": "..."}.')
    if not isinstance(fields.get("id"), str | int | None):
        raise InputError("an id is a text or a whole number; change it.")
    return fields


def settings_of(fields, line, args):
    """How a line asks for its text to be sampled, and where it does not, the flags.

    A line without a seed has one of its own, by the flag's and its number. Raises InputError.
    """
    settings = {}
    for name, limit in LIMITS.items():
        value = getattr(args, name) if fields.get(name) is None else fields[name]
        if isinstance(value, float) and value.is_integer() and limit.kind is int:
            value = int(value)                                   # as in 8.0
        try:
            settings[name] = None if value is None else limit(json.dumps(value))
        except (ValueError, argparse.ArgumentTypeError):
            raise InputError(f"{name} cannot be {json.dumps(value)[:40]}; "
                             f"see --{name.replace('_', '-')} in --help.") from None
    if fields.get("seed") is None:
        settings["seed"] = derived_seed(args.seed, line)
    return settings


def read_prompts(lines, args, made_by):
    """(what is asked for, None or a sentence) for each sample of each line that is not blank.

    What is asked for is the start of a result: line and sample, and unless the line is at fault id,
    prompt and settings, with made_by (a dict) among these. Sample 0 has the line's seed, each
    further one a seed of its own.
    """
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        asked, settings, error = {}, None, None
        try:
            fields = read_line(text)
            asked = {name: fields[name] for name in ("id", "prompt")
                     if fields.get(name) is not None}
            settings = settings_of(fields, line, args)
        except InputError as fault:
            error = str(fault)
        for sample in range(args.samples):
            key = {"line": line, "sample": sample, **asked}
            if settings:
                seed = derived_seed(settings["seed"], sample) if sample else settings["seed"]
                key["settings"] = {**made_by, **settings, "seed": seed}
            yield key, error


def read_requests(prompts, done, tokenizer):
    """A Request for everything that is not done, or a Result where the line is at fault.

    prompts: as from read_prompts. done: as from read_results.
    """
    for key, error in prompts:
        if done.get((key["line"], key["sample"])) is not None:
            continue
        request = Request([], key=key)
        try:
            if error:
                raise InputError(error)
            settings = {name: key["settings"][name] for name in LIMITS}
            request = Request(tokenizer.encode(key["prompt"], prefix=True), settings.pop("tokens"),
                              **settings, key=key)
        except InputError as fault:
            request = Result(request, error=str(fault))
        yield request


def result_line(result, tokenizer):
    """The line of a Result, as a dict."""
    if result.error:
        return result.request.key | {"error": result.error}
    text = tokenizer.token_bytes(result.ids).decode("utf-8", "replace")
    return result.request.key | {"text": text, "tokens": len(result.ids), "finish": result.finish,
                                 "cr": round(result.cr, 4)}


def write_line(out, line):
    """Write a result, a dict, as a line into an unbuffered file, whole or not at all.

    Raises InputError.
    """
    data, end = as_line(line), os.fstat(out.fileno()).st_size
    with writing(out.name):
        try:
            while data:
                data = data[out.write(data):]
        except OSError:
            with suppress(OSError):                 # on a full disk there is always room for less
                os.ftruncate(out.fileno(), end)
            raise


@contextmanager
def writing(path):
    """Raises InputError where the results at `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({reason(error)}); free some space, and "
                         "the same command goes on from here.") from None


# ------------------------------------------------------------------------- what is seen meanwhile

class Progress(ProgressLine):
    """A line about an engine's run.

    Rates are those of the last minute. What is left counts the parts of texts that are on their
    way, so it shrinks from the start on.
    """

    def __init__(self, engine, total, done, clock=time.perf_counter):
        super().__init__(clock)
        self.engine, self.total, self.first, self.done = engine, total, done, done
        self.tokens, self.failed, self.start = 0, 0, clock()
        self.shown, self.past = self.start, deque([(self.start, 0, 0.0)])

    def seconds(self):
        return max(self.clock() - self.start, 1e-9)

    def add(self, result):
        self.done += 1
        self.tokens += len(result.ids)
        self.failed += result.error is not None

    def under_way(self):
        """The sequences that are neither finished nor untouched."""
        engine = self.engine
        asked = (seq for report in engine.pending for seq in report.asked.values())
        return {seq for seq in (*engine.running.values(), *engine.waiting, *asked) if seq.ids}

    def rates(self):
        """Tokens per second, and seconds left or None, by the last minute."""
        now, parts = self.clock(), self.under_way()
        tokens = self.tokens + sum(len(seq.ids) for seq in parts)
        work = self.done - self.first + sum(len(seq.ids) / seq.count for seq in parts)
        while len(self.past) > 1 and now - self.past[1][0] >= 60:
            self.past.popleft()
        then, tokens_then, work_then = self.past[0]
        self.past.append((now, tokens, work))
        seconds, worked = max(now - then, 1e-9), work - work_then
        left = self.total - self.first - work
        return (tokens - tokens_then) / seconds, left * seconds / worked if worked > 0 else None

    def __str__(self):
        held, pages = self.engine.known.values(), len(self.engine.cache.free)
        rate, left = self.rates()
        facts = [f"{self.done:,}/{self.total:,} requests", f"{rate:,.0f} tokens/s",
                 f"{sum(h.pages for h in held) / pages:.0%} of pages"]
        if slots := sum(h.slots for h in held):
            facts.append(f"CR {sum(h.fed for h in held) * self.engine.all_heads / slots:.2f}")
        if left is not None:
            facts.append(f"{duration(left)} left")
        return "  ".join(facts)

    def summary(self):
        engine, seconds, steps = self.engine, self.seconds(), self.engine.steps
        host = f", the host busy for {1 - engine.waited / seconds:.0%} of it"
        return (
            f"{self.done - self.first:,} requests, {self.tokens:,} tokens in {seconds:.1f} s, "
            f"{self.tokens / seconds:,.0f} tokens/s\n"
            f"{steps:,} steps, {1000 * seconds / max(steps, 1):.1f} ms per step"
            f"{host if engine.tokens.is_cuda else ''}; {engine.preempted:,} preempted\n"
            f"{self.first:,} were done before, {self.failed:,} have errors")

    def interrupted(self, args):
        """What an interruption left, and how to go on."""
        more = ("The same command goes on." if rank_count() > 1 else
                f"To go on:\n    {typed('generate.py', *args.command)}")
        return to_show(f"\nStopped. {self.done - self.failed:,} of {self.total:,} results are in "
                       f"{args.out}. {more}")


def profiler(path):
    """A torch.profiler over steps 10 to 30 that writes to path; None: nothing is profiled."""
    if not path:
        return nullcontext()
    try:
        path.write_text("")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({reason(error)}); check --profile.") from None

    def write(profile):
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
        path.write_text(table)
    steps = torch.profiler.schedule(wait=8, warmup=2, active=20, repeat=1)
    return torch.profiler.profile(schedule=steps, on_trace_ready=write)


# ------------------------------------------------------------------------------------ --prompts

def answer_prompts(args, model, tokenizer, gain, done, name):
    """Run the prompts of args.prompts and add a line to args.out for each sample as it finishes.

    done: what read_results found there. gain: as in Transformer.hidden. name: the model's, as for
    model_mark. Raises InputError if the results are not those of what is asked for, and in the end
    if some have errors.
    """
    weight = model.lm_head.weight
    made_by = {"model": model_mark(name), "dtype": dtype_name(weight), "cache": args.cache}
    with args.prompts.open("rb") as lines:
        total = args.samples * sum(1 for line in bounded(lines) if line.strip())
        lines.seek(0)
        if done:
            asked = (key for key, _ in read_prompts(bounded(lines), args, made_by))
            check_results(args.out, done, asked, args.samples)
            lines.seek(0)
        ready = sum(mark is not None and sample < args.samples
                    for (_, sample), mark in done.items())
        rows = args.batch[0] if args.batch else (128 if weight.is_cuda else 32)
        rows = max(1, min(rows, total - ready))
        engine = Engine(model, rows, pages_that_fit(model, rows, args.cache_gb, gain),
                        tokenizer.stops, gain)
        if None in done.values() and this_rank() == 0:           # all ranks have read them by now
            drop_errors(args.out)
        progress = Progress(engine, total, ready)
        requests = read_requests(read_prompts(bounded(lines), args, made_by), done, tokenizer)
        try:
            write_results(args, engine, requests, tokenizer, progress)
        except KeyboardInterrupt:
            progress.clear()
            print(progress.interrupted(args))
            raise
    progress.clear()
    print(progress.summary())
    if progress.failed:
        raise InputError(f"{progress.failed} of the prompts could not be continued; "
                         f"{args.out} has a sentence for each, and the same command tries again.")


def write_results(args, engine, requests, tokenizer, progress):
    """Run the requests. Each result becomes a line of args.out, an error also one on stderr."""
    writes, synced = this_rank() == 0, [time.monotonic()]
    with ((args.out if writes else Path(os.devnull)).open("ab", buffering=0) as out,
          profiler(args.profile if writes else None) as profile):
        def each_step():
            progress.show(progress.clock())
            if writes and time.monotonic() - synced[0] > 1:
                synced[0] = time.monotonic()
                with writing(args.out):
                    sync(args.out)
            if profile:
                profile.step()
        for result in engine.run(requests, each_step):
            line = result_line(result, tokenizer)
            if result.error:
                progress.clear()
                said = f"generate.py: {args.prompts}, line {line['line']}: {result.error}"
                print(to_show(said, sys.stderr), file=sys.stderr)
            write_line(out, line)
            progress.add(result)
    if writes:
        with writing(args.out):
            sync(args.out)
            sync(args.out.resolve().parent)
