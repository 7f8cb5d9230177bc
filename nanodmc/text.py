"""Documents become tokens on disk, and those become batches."""

import hashlib
import json
import os
import threading
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context, parent_process

import numpy as np
import torch

from nanodmc import token_cache
from nanodmc.documents import documents, form_of, standard_library, text_files
from nanodmc.files import InputError, reason
from nanodmc.tokenizer import Tokenizer

# ------------------------------------------------------------------------------ documents to tokens

@lru_cache(maxsize=1)
def tokenizer_of(folder):
    """The tokenizer of a checkpoint, or of bytes where `folder` is None; read once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")          # whoever chose the folder has been warned
        return Tokenizer.from_folder(folder) if folder else Tokenizer.bytes()


def encode(folder, texts):
    """Each text's tokens, an array each: the template's prefix, the text, the end of text."""
    tokenizer = tokenizer_of(folder)
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    dtype = token_cache.dtype_of(tokenizer.vocab_size)
    return [np.array(tokenizer.encode(text, special=False, prefix=True) + end, dtype=dtype)
            for text in texts]


def end_with_parent():
    """Let this process end as soon as the one that started it has, however that ended."""
    def watch():
        parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def encode_all(files, folder, field, alone=2 ** 24):
    """Yield the documents of all files as arrays of tokens, in order, and the share that is done.

    More bytes than `alone` are cut into portions for as many processes as there are cores. Only a
    few portions are in memory at any time.
    """
    sizes = np.cumsum([0, *(f.stat().st_size for f in files)])

    def portions():
        texts, size = [], 0
        for i, path in enumerate(files):
            for text, read in documents(path, field):
                texts.append(text)
                size += len(text)
                if size > 2 ** 20:
                    yield texts, (sizes[i] + read) / sizes[-1]
                    texts, size = [], 0
        yield texts, 1.0

    if sizes[-1] <= alone:
        yield from ((encode(folder, texts), done) for texts, done in portions())
        return
    affinity = getattr(os, "sched_getaffinity", None)
    workers = len(affinity(0)) if affinity else os.cpu_count()
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
            waiting = deque()
            for texts, done in portions():
                waiting.append((pool.submit(encode, folder, texts), done))
                if len(waiting) > 2 * workers:
                    future, done = waiting.popleft()
                    yield future.result(), done
            yield from ((future.result(), done) for future, done in waiting)
    except BrokenProcessPool:
        raise InputError("a process that tokenizes was killed, perhaps for want of memory; start "
                         "again with fewer cores (taskset) or more memory.") from None


def content_key(files, folder, field):
    """A name for the tokens of these files.

    It is the same for the same contents in the same order and the same tokenizer. What an earlier
    version read in another way has another name. Raises InputError where a file cannot be read.
    """
    tokenizer, whole = tokenizer_of(folder), hashlib.blake2b(digest_size=12)
    named = np.ravel(tokenizer.special_ids.get("eos_token_id")).tolist()[:1]
    odd = tokenizer.added.oddities or tokenizer.odd_merges
    newer = [] if tokenizer.eos and [tokenizer.eos] == named and not odd else [2, tokenizer.eos]
    try:
        whole.update(json.dumps([field, tokenizer.special_ids, *newer]).encode())
        whole.update(tokenizer.files["tokenizer.json"])
        for path in files:
            form = form_of(path)
            newer = [] if form.as_ever else [2, form.kind]
            size = path.stat().st_size
            whole.update(json.dumps([path.suffixes[-2:], size, *newer]).encode())
            with path.open("rb") as f:
                while block := f.read(2 ** 20):
                    whole.update(block)
                    if f.tell() > size:              # it may never end
                        break
                if f.tell() != size:
                    raise InputError(f"{path} has another size than its folder says; give a file "
                                     "that nothing writes to.")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); check --data.") from None
    return whole.hexdigest()


def prepare(files, folder, field, cache):
    """Tokenize into the folder cache/KEY, unless that is done. Returns KEY.

    Raises InputError where a file cannot be read or changes meanwhile, or the cache cannot be
    written.
    """
    key = content_key(files, folder, field)

    def portions():
        yield from encode_all(files, folder, field)
        if content_key(files, folder, field) != key:      # the name would be that of other tokens
            raise InputError("a file of --data was changed while it was tokenized; start again.")

    vocab_size = tokenizer_of(folder).vocab_size
    if token_cache.fault(cache / key, vocab_size):
        token_cache.make(cache / key, vocab_size, portions)
    return key


# ------------------------------------------------------------------------------ tokens to batches

class Text:
    """Documents of a memory-mapped file of tokens, in a given order: has a length, and slices."""

    def __init__(self, tokens, starts, ends):
        self.tokens, self.starts, self.ends = tokens, starts, np.cumsum(ends - starts)
        # from a place in this text to the place in the file
        self.shift = starts - self.ends + (ends - starts)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, span):
        parts, at, stop = [], span.start, min(span.stop, len(self))
        for i in range(np.searchsorted(self.ends, at, side="right"), len(self.ends)):
            if at >= stop:
                break
            end = min(stop, int(self.ends[i]))
            parts.append(self.tokens[at + self.shift[i]:end + self.shift[i]])
            at = end
        return np.concatenate(parts) if parts else self.tokens[:0]


def files_of(settings, wrong):
    """The files of the text. wrong: why tokens from before are of no use; None: there are none."""
    try:
        files = text_files(settings.data) if settings.data else standard_library()
    except InputError as error:
        raise InputError(f"the tokens from before are of no use ({wrong}), and {error}"
                         if wrong else str(error)) from None
    if not files:
        raise InputError("this Python has no sources of its standard library; "
                         "give text files with --data.")
    return files


def load_data(settings, folder, key=None):
    """The text for training, the text for validation, and the key of both, made if need be.

    folder: whose tokenizer; None: bytes. key: from an earlier call, whose tokens are taken as they
    are if they are still there and whole. Raises InputError where text is missing or too short.

    The order of the documents depends on nothing but their number. The first 1 in 20 of them, no
    more than 10,000, are set aside for validation; of a single document, its last twentieth.
    """
    cache, vocab_size = token_cache.where(), tokenizer_of(folder).vocab_size
    named = token_cache.KEY.fullmatch(str(key))      # it is from a file, which may say anything
    wrong = token_cache.fault(cache / key, vocab_size) if named else "no such text"
    if wrong:
        key = prepare(files_of(settings, wrong if key else None), folder, settings.field, cache)
    ends, tokens = np.fromfile(cache / key / "ends", np.int64), np.zeros(0)
    if ends[-1:].any():                     # an empty file cannot be mapped
        tokens = np.memmap(cache / key / "tokens", token_cache.dtype_of(vocab_size), mode="r")
    else:
        raise InputError("the files of --data have no text in them; give others.")
    starts = np.concatenate([[0], ends[:-1]])
    if len(ends) == 1:
        cut = len(tokens) * 19 // 20
        starts, ends, order = np.array([0, cut]), np.array([cut, len(tokens)]), np.array([1, 0])
    else:
        order = np.random.default_rng(0).permutation(len(ends))
    held_out = max(1, min(len(ends) // 20, 10_000))
    val, train = (Text(tokens, starts[part], ends[part])
                  for part in (order[:held_out], order[held_out:]))
    for name, text in (("training", train), ("validation", val)):
        if len(text) <= settings.context:
            raise InputError(
                f"the {name} text has {len(text)} tokens, and one sequence takes "
                f"{settings.context + 1}; give more text with --data or a smaller --context.")
    return train, val, key


def sequences(tokens, starts, length, device):
    """Inputs and targets, (len(starts), length) each: the tokens from each start, and the next."""
    x = torch.from_numpy(np.stack([tokens[i:i + length + 1] for i in starts]).astype(np.int64))
    x = x.to(device)
    return x[:, :-1], x[:, 1:]


@lru_cache(maxsize=2)
def shuffled(seed, epoch, n):
    return np.random.default_rng([seed, epoch]).permutation(n)


def first_sequences(tokens, settings, position, device, count=8192):
    """At least `count` tokens, in sequences (1, T), from the batch at a position of the data on."""
    T, size = settings.context, settings.batch
    places = (divmod(row, size) for row in range(-(-count // T)))
    return [batch(tokens, settings, position + step, device, range(row, row + 1))[0]
            for step, row in places]


def batch(tokens, settings, position, device, rows=None):
    """The batch at a position of the data, the same for every model that gets there.

    rows: a range of its sequences; None: all. A text that was given is cut into sequences, all of
    which are read once in a shuffled order, then again in another one. In the small model's text,
    sequences begin at random places.
    """
    s, T = settings, settings.context
    rows = range(s.batch) if rows is None else rows
    if s.data:
        n = (len(tokens) - 1) // T
        places = (divmod(position * s.batch + row, n) for row in rows)
        starts = [shuffled(s.seed, epoch, n)[i] * T for epoch, i in places]
    else:
        draw = np.random.default_rng([s.seed, position])
        starts = draw.integers(0, len(tokens) - T, s.batch)[rows.start:rows.stop]
    return sequences(tokens, starts, T, device)
