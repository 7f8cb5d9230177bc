"""Reading and writing files: a write is whole or not at all, a fault is told in one sentence."""

import json
import os
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

LFS_POINTER = "version https://git-lfs.github.com/spec/"


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one sentence: what is wrong and what to do.
    """


def one_line(error):
    """The first line of an exception's message, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def listed(names, limit=4):
    """The names in a row; of more than `limit` the first ones, "and 3 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def write_atomically(path, write):
    """Call write(temporary path), then move the file into place.

    A reader of `path` sees the old file or the new one, never a part. Raises InputError where the
    folder cannot be written or the disk is full; the old file is untouched then.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(
            f"{path} cannot be written ({getattr(error, 'strerror', None) or error}); "
            "choose another folder or free some space.") from None


def write_json(path, value):
    """Write value as indented JSON, whole or not at all. Raises InputError."""
    write_atomically(path, lambda f: f.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path):
    """The value in a JSON file.

    Raises InputError where the file is missing, damaged, or a pointer that git-lfs left in its
    place.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(LFS_POINTER):
            raise InputError(f"{path} is a git-lfs pointer, not the file itself; "
                             f"run git lfs pull in {path.parent}.")
        return json.loads(text)
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing; give the folder of a run or of a checkpoint.") from None
    except (OSError, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{path} is damaged; restore it, or give another folder.") from None


def read_lines(path):
    """The lines of a file; none where it cannot be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def read_text(path, source="--data"):
    """The text in a file that the flag `source` named. Raises InputError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check {source}.") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is not UTF-8 text; convert it, or leave it out of {source}.") from None
