"""Tokens on disk: made once for a text, by one process, and looked at before each use."""

import hashlib
import os
import re
import shutil
import sys
import time
from array import array
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

import numpy as np

from nanodmc.files import PARTIAL, InputError, one_line, read_json, reason, sync, write_json
from nanodmc.locks import Lock

NAMES = ("tokens", "ends")       # all in a row, and where each document ends (int64)
KEY = re.compile("[0-9a-f]{24}")
RECORD = "record.json"           # size and checksum of both; the first version made none


def dtype_of(vocab_size):
    """The type of saved tokens."""
    return np.uint16 if vocab_size <= 2 ** 16 else np.uint32


# ------------------------------------------------------------------------------- what is there

def checksum(path):
    """The size of a file and the checksum of its content; a few seconds for each GB."""
    whole = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2 ** 22):
            whole.update(block)
        return [file.tell(), whole.hexdigest()]


def fault(folder, vocab_size):
    """What is wrong with the tokens in a folder, in a few words; None where they are whole.

    They are read as a whole and compared with the record. Where there is none, because an earlier
    version made them, it must do that sizes fit and that the tokenizer has all tokens.
    """
    dtype = np.dtype(dtype_of(vocab_size))
    tokens, ends = (folder / name for name in NAMES)
    if missing := [path.name for path in (tokens, ends) if not path.is_file()]:
        return f"{' and '.join(missing)} missing"
    try:
        recorded = os.path.lexists(folder / RECORD)
        if recorded and read_json(folder / RECORD) != {n: checksum(folder / n) for n in NAMES}:
            return "sizes or checksums differ from its record"
        places = np.fromfile(ends, np.int64)
        total = int(places[-1]) if len(places) else 0
        if places.nbytes != ends.stat().st_size or total * dtype.itemsize != tokens.stat().st_size:
            return "its files have sizes that do not fit"
        if (np.diff(places, prepend=0) < 0).any():
            return "a document ends before it begins"
        if not recorded and total and np.memmap(tokens, dtype, mode="r").max() >= vocab_size:
            return "it has tokens that the tokenizer lacks"
    except InputError as error:
        return f"its record cannot be read: {one_line(error)}"
    except OSError as error:
        return reason(error)
    return None


# ---------------------------------------------------------------------------------- making them

def write_tokens(folder, portions):
    """Save tokens into a new folder, with the progress on the screen.

    portions: yields arrays, one for each document, and the share that is done.
    """
    began = shown = time.perf_counter()
    ends, total, whole = array("q"), 0, hashlib.blake2b(digest_size=16)
    every, end = (1, "\r") if sys.stdout.isatty() else (30, "\n")     # seconds between two lines
    folder.mkdir()
    with (folder / "tokens").open("wb") as out:
        for arrays, done in portions:
            for tokens in arrays:
                tokens.tofile(out)
                whole.update(tokens)
                total += len(tokens)
                ends.append(total)
            now = time.perf_counter()
            if now - shown > every:
                shown = now
                print(f"tokenizing {done:4.0%}, {total:,} tokens, "
                      f"{total / (shown - began):,.0f} per second", end=end, flush=True)
        size = out.tell()
    with (folder / "ends").open("wb") as out:
        ends.tofile(out)
    for name in NAMES:
        sync(folder / name)
    # of what was meant to be written, not of what is there
    write_json(folder / RECORD, {"tokens": [size, whole.hexdigest()],
                                 "ends": [8 * len(ends), digest_of(ends)]})


def digest_of(ends):
    return hashlib.blake2b(ends, digest_size=16).hexdigest()


def lock_of(folder, wait=False):
    return Lock(folder.with_name(f"{folder.name}.lock"), f"the cache of tokens {folder}", wait)


def waited_for(folder):
    """The lock of a folder of tokens; says so where another process has it, and waits."""
    try:
        return lock_of(folder)
    except InputError:
        print("another process is tokenizing the same text; waiting for it", flush=True)
        return lock_of(folder, wait=True)


def remove_leftovers(folder):
    """Remove what making this folder left when it was killed, now or in an earlier version.

    Call it under the folder's lock.
    """
    for path in folder.parent.glob(f"*{PARTIAL}"):
        if path.name.removeprefix(".").startswith(f"{folder.name}."):
            shutil.rmtree(path, ignore_errors=True)


def clean(cache):
    """Remove what kills left in a cache, unless a process is at it still."""
    names = {path.name.removeprefix(".").partition(".")[0]
             for end in (PARTIAL, ".lock") for path in cache.glob(f"*{end}")}
    for name in filter(KEY.fullmatch, names):
        with suppress(InputError), lock_of(cache / name):        # which somebody may hold
            remove_leftovers(cache / name)


def make(folder, vocab_size, portions):
    """Save the tokens of a text in a folder, whole or not at all, unless it has them already.

    portions: a function, which is called where there is work; see write_tokens. Where another
    process makes the same, waits for it; where they are damaged, says so. Raises InputError where
    the disk cannot be written.
    """
    cache, begun = folder.parent, f".{folder.name}.{token_hex(8)}"
    unfinished, damaged = cache / f"{begun}{PARTIAL}", cache / f"{begun}.damaged{PARTIAL}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError("it is read-only")
        clean(cache)
        with waited_for(folder):
            remove_leftovers(folder)
            wrong = fault(folder, vocab_size)
            if wrong is None:
                return
            if os.path.lexists(folder):
                print(f"the tokens in {folder} are damaged ({wrong}); tokenizing anew", flush=True)
            try:
                write_tokens(unfinished, portions())
                if os.path.lexists(folder):          # what is mapped from it stays readable
                    folder.replace(damaged)
                unfinished.replace(folder)
                sync(cache)
            finally:
                for path in (unfinished, damaged):
                    shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{cache} cannot be written ({reason(error)}); set XDG_CACHE_HOME "
                         "to another folder or free some space.") from None


def where():
    """The folder of all saved tokens."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dmc"
