"""A file of prompts, answered into a file of results, so that a killed run loses nothing.

A prompt is a line of JSON: {"prompt": "..."}, and where it differs from the flags id, tokens,
temperature, top_k, top_p, seed. A result is a line with the number of its prompt's line, its id
and prompt, and text, tokens, finish and cr; or error, a sentence. Results come in the order of
finishing.
"""

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from nanodmc.cli import number
from nanodmc.engine import Engine, Request, Result
from nanodmc.files import InputError, one_line
from nanodmc.parallel import this_rank
from nanodmc.pool import pages_that_fit

LIMITS = {"tokens": number(1, kind=int), "temperature": number(0), "top_k": number(0, kind=int),
          "top_p": number(0, 1), "seed": number(0, 2 ** 62, int)}      # of each setting


# ---------------------------------------------------------------------------- lines of the files

def fingerprint(line):
    """What a line of results and its line of prompts have in common."""
    return hash((line.get("id"), line["prompt"]))


def read_results(path):
    """What a file of results has already: {number: fingerprint, or None for an error}.

    Creates the file if there is none, and cuts off what a kill left of a last line. Raises
    InputError for a file of anything else, and leaves it as it is.
    """
    done, end = {}, 0
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file; name another --out.")
    try:
        with path.open("ab+") as f:                         # raises where it cannot be written
            f.seek(0)
            for text in f:
                if not text.endswith(b"\n"):
                    if text[:9] != b'{"line": '[:len(text)]:
                        raise ValueError
                    break
                result = json.loads(text)
                done[result["line"]] = None if "error" in result else fingerprint(result)
                end += len(text)
            f.truncate(end)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); check --out.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is no file of results; name another --out.") from None
    return done


def read_request(text, key, args, tokenizer):
    """A Request from a line of JSON, with `key` as its key, to which id and prompt are added.

    args: the flags. Raises InputError.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is no JSON ({one_line(error)}); "
                         "write each prompt as a line of it.") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise InputError('a line is an object with a text as its prompt; write {"prompt": "..."}.')
    if not isinstance(fields.get("id", ""), str | int):
        raise InputError("an id is a text or a whole number; change it.")
    key |= {name: fields[name] for name in ("id", "prompt") if name in fields}
    settings = {}
    for name, limit in LIMITS.items():
        value = getattr(args, name) if fields.get(name) is None else fields[name]
        try:
            settings[name] = None if value is None else limit(json.dumps(value))
        except (ValueError, argparse.ArgumentTypeError):
            raise InputError(f"{name} cannot be {json.dumps(value)[:40]}; "
                             f"see --{name.replace('_', '-')} in --help.") from None
    prompt = tokenizer.encode(fields["prompt"], prefix=True)
    return Request(prompt, settings.pop("tokens"), **settings, key=key)


def read_requests(lines, done, args, tokenizer):
    """A Request for every line that is not done, or a Result where the line is at fault.

    Raises InputError where the results in `done` are of other prompts.
    """
    for line, text in enumerate(lines, 1):
        key = {"line": line}
        if not text.strip() or line in done and done[line] is None:
            continue
        try:
            request = read_request(text, key, args, tokenizer)
        except InputError as error:
            request = Result(Request([], key=key), error=str(error))
        if line not in done:
            yield request
        elif "prompt" not in key or done[line] != fingerprint(key):
            raise InputError(f"{args.out} has results of other prompts than {args.prompts}, "
                             f"as of line {line}; name another --out.")


def result_line(result, tokenizer):
    """The line of a Result, as a dict."""
    if result.error:
        return result.request.key | {"error": result.error}
    text = tokenizer.token_bytes(result.ids).decode("utf-8", "replace")
    return result.request.key | {"text": text, "tokens": len(result.ids), "finish": result.finish,
                                 "cr": round(result.cr, 4)}


def write_line(out, line):
    """Write a dict as a line of JSON into an unbuffered file. Raises InputError."""
    data = json.dumps(line).encode() + b"\n"
    try:
        while data:
            data = data[out.write(data):]
    except OSError as error:
        raise InputError(f"{out.name} cannot be written ({error.strerror}); free some space, and "
                         "the same command goes on from here.") from None


# ------------------------------------------------------------------------- what is seen meanwhile

class Progress:
    """A line about an engine's run every second, or every ten without a terminal."""

    def __init__(self, engine, total, done):
        self.engine, self.total, self.first, self.done = engine, total, done, done
        self.tokens, self.failed, self.terminal = 0, 0, sys.stderr.isatty()
        self.start = self.shown = time.perf_counter()

    def seconds(self):
        return max(time.perf_counter() - self.start, 1e-9)

    def add(self, result):
        self.done += 1
        self.tokens += len(result.ids)
        self.failed += result.error is not None

    def show(self):
        """Print the line, if it is time."""
        if time.perf_counter() - self.shown > (1 if self.terminal else 10):
            self.shown = time.perf_counter()
            self.write(f"{self!s:<79}" if self.terminal else str(self))

    def clear(self):
        """Make room on the terminal for another line."""
        if self.terminal:
            self.write(" " * 79)

    def write(self, line):
        print(line, end="\r" if self.terminal else "\n", file=sys.stderr, flush=True)

    def __str__(self):
        held, pages = self.engine.known.values(), len(self.engine.cache.free)
        facts = [f"{self.done:,}/{self.total:,} requests",
                 f"{self.tokens / self.seconds():,.0f} tokens/s",
                 f"{sum(h.pages for h in held) / pages:.0%} of pages"]
        if slots := sum(h.slots for h in held):
            facts.append(f"CR {sum(h.fed for h in held) * self.engine.all_heads / slots:.2f}")
        if answered := self.done - self.first:
            left = self.seconds() * (self.total - self.done) / answered
            facts.append(f"{left:,.0f} s left")
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


def profiler(path):
    """A torch.profiler over steps 10 to 30 that writes to path; None: nothing is profiled."""
    if not path:
        return nullcontext()
    try:
        path.write_text("")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); check --profile.") from None

    def write(profile):
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
        path.write_text(table)
    steps = torch.profiler.schedule(wait=8, warmup=2, active=20, repeat=1)
    return torch.profiler.profile(schedule=steps, on_trace_ready=write)


# ------------------------------------------------------------------------------------ --prompts

def answer_prompts(args, model, tokenizer, gain, done):
    """Run the prompts of args.prompts and add a line to args.out for each as it finishes.

    done: what read_results found there. gain: as in Transformer.hidden. Raises InputError in the
    end if some have errors.
    """
    writes = this_rank() == 0
    with args.prompts.open("rb") as lines:
        total = sum(1 for line in lines if line.strip())
        lines.seek(0)
        rows = args.batch[0] if args.batch else (128 if next(model.parameters()).is_cuda else 32)
        rows = max(1, min(rows, total - len(done)))
        pages = pages_that_fit(model, rows, args.cache_gb, gain)
        engine = Engine(model, rows, pages, tokenizer.stops, gain)
        progress = Progress(engine, total, len(done))
        with ((args.out if writes else Path(os.devnull)).open("ab", buffering=0) as out,
              profiler(args.profile if writes else None) as profile):
            def each_step():
                progress.show()
                if profile:
                    profile.step()
            for result in engine.run(read_requests(lines, done, args, tokenizer), each_step):
                line = result_line(result, tokenizer)
                if result.error:
                    progress.clear()
                    print(f"generate.py: {args.prompts}, line {line['line']}: {result.error}",
                          file=sys.stderr)
                write_line(out, line)
                progress.add(result)
    progress.clear()
    print(progress.summary())
    if progress.failed:
        raise InputError(f"{progress.failed} of the prompts could not be continued; "
                         f"{args.out} has a sentence for each.")
