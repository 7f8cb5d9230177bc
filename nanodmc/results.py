"""A file of results: what is done already, and whether the same model and settings did it.

A result is a line of JSON with the number of its prompt's line and of its sample, its id and
prompt, its `settings` (all that decides the text: model, dtype, cache, sampling), and text, tokens,
finish and cr; or error, a sentence. Last comes `check`, a checksum of the rest; older files have
none. Errors are tried again whenever the file is continued.
"""

import hashlib
import json
import shutil
from itertools import combinations
from pathlib import Path

from nanodmc.files import InputError, is_number, reason, write_atomically
from nanodmc.records import seal

# the files that decide a text: sizes, weights, vocabulary, and which tokens end a text
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json", "*.safetensors", "pytorch_model*.bin")
WHOLE = 2 ** 28      # bytes of weights that are read in full to tell models apart


def model_mark(name):
    """A short text that tells a model from others. name: its folder, or a text that names it.

    Of a folder, it follows from the content of config, tokenizer and weights; of large files, from
    4 KB of every MB.
    """
    mark = hashlib.sha256()
    if not isinstance(name, Path):
        mark.update(name.encode())
        return mark.hexdigest()[:16]
    for path in sorted({path for pattern in FILES for path in name.glob(pattern)}):
        size = path.stat().st_size
        mark.update(f"{path.name} {size} ".encode())
        with path.open("rb") as f:
            for start in range(0, size, 2 ** 20):
                f.seek(start)
                mark.update(f.read(2 ** 20 if size <= WHOLE else 2 ** 12))
    return mark.hexdigest()[:16]


def fingerprint(line):
    """What a result and what is asked for have in common, if one is the other's."""
    return hash((line.get("id"), line["prompt"],
                 json.dumps(line.get("settings"), sort_keys=True)))


def refuse_same_files(**files):
    """Raise InputError where two flags name one file, by whatever link. files: flag -> path."""
    given = [(flag, path) for flag, path in files.items() if path]
    for (flag, path), (other, its) in combinations(given, 2):
        if path.resolve() == its.resolve() or (
                path.exists() and its.exists() and path.samefile(its)):
            one, two = (f"--{name.replace('_', '-')}" for name in (flag, other))
            raise InputError(f"{one} and {two} are one file, {path}; give {two} another.")


def refuse_files_of(folder, **files):
    """Raise InputError where a file that is to be written is one of the model's in a folder."""
    theirs = [file for pattern in FILES for file in folder.glob(pattern)]
    for flag, path in files.items():
        if path and path.exists() and any(path.samefile(file) for file in theirs):
            raise InputError(f"{path} belongs to the model; give --{flag} another file.")


def as_line(result):
    """A result, a dict, as a line of the file, in bytes."""
    return json.dumps({**result, "check": seal(result)}).encode() + b"\n"


def parsed(text):
    """The result in a line of the file. Raises ValueError where it is none, or was changed."""
    result = json.loads(text)
    if not isinstance(result, dict):
        raise ValueError
    check = result.pop("check", None)
    if check not in (None, seal(result)):
        raise ValueError
    return result


def is_torn(text):
    """Whether this may be what a kill or a power cut left of a last line: a part, then zeros."""
    text = text.rstrip(b"\0")
    return text[:9] == b'{"line": '[:len(text)] and b"\0" not in text


def read_results(path, writes=True):
    """What a file has already: {(line, sample): fingerprint, or None for an error}.

    The one who writes creates the file if there is none, and behind a whole result cuts off what
    a kill or a power cut left of a last line. Raises InputError for a file of anything else or with
    a damaged line, and leaves it as it is.
    """
    done, end = {}, 0
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file; name another --out.")
    if not writes and not path.exists():
        return done
    try:
        with path.open("ab+" if writes else "rb") as f:     # raises where it cannot be written
            f.seek(0)
            for number, text in enumerate(f, 1):
                if not text.endswith(b"\n") and end and is_torn(text):
                    break
                try:
                    result = parsed(text)
                    place = result["line"], result.get("sample", 0)
                    if not all(is_number(x, 0, kind=int) for x in place):
                        raise ValueError
                    done[place] = None if "error" in result else fingerprint(result)
                    if not text.endswith(b"\n"):
                        raise ValueError
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise InputError(
                        f"{path} has a damaged line, number {number}; delete that line, and the "
                        "same command answers its prompt anew." if end else
                        f"{path} is no file of results; name another --out.") from None
                end += len(text)
            if writes:
                f.truncate(end)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({reason(error)}); check --out.") from None
    return done


def check_results(path, done, asked, samples):
    """Raise InputError where results in `done` are not those of `asked`.

    asked: line, sample, id, prompt and settings in dicts, as in a result; without settings where
    the line is at fault. samples: how many are asked for of each line; further ones may stay.
    """
    left = {place for place, mark in done.items() if mark is not None and place[1] < samples}
    for ours in asked:
        place = ours["line"], ours["sample"]
        if place in left:
            left.remove(place)
            if "settings" not in ours or done[place] != fingerprint(ours):
                raise InputError(difference(path, ours))
    if left:
        raise InputError(f"{path} has results of other prompts, as of line {min(left)[0]}; "
                         "name another --out.")


def difference(path, ours):
    """What keeps a result in the file from being that of `ours`, in a sentence."""
    place = ours["line"], ours["sample"]
    with path.open("rb") as f:
        theirs = next(line for line in map(json.loads, f)
                      if (line["line"], line.get("sample", 0)) == place and "error" not in line)
    if "settings" not in ours or any(theirs.get(x) != ours.get(x) for x in ("id", "prompt")):
        return f"{path} has results of other prompts, as of line {place[0]}; name another --out."
    before, now = theirs.get("settings"), ours["settings"]
    if not isinstance(before, dict):
        return (f"{path} does not say how its results were made, as of line {place[0]}; "
                "name another --out.")
    other = [name if name in ("model", "seed") else
             f"{name} ({json.dumps(before.get(name))}, now {json.dumps(value)})"
             for name, value in now.items() if before.get(name) != value]
    return (f"{path} has results of another {' and '.join(other)}, as of line {place[0]}; "
            "name another --out, or repeat what made them.")


def drop_errors(path):
    """Take the errors out of a file of results, because they are tried again."""
    def write(temporary):
        with path.open("rb") as old, temporary.open("wb") as new:
            new.writelines(text for text in old if "error" not in json.loads(text))
        shutil.copymode(path, temporary)
    write_atomically(path.resolve(), write)
