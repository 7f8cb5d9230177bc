"""Reading and writing files: a write is whole or not at all, a fault is told in one sentence."""

import errno
import json
import math
import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from safetensors import SafetensorError

PARTIAL = ".partial"              # the end of the name of what is being written
LFS_POINTER = "version https://git-lfs.github.com/spec/"


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one sentence: what is wrong and what to do.
    """


def one_line(error):
    """The first line of an exception's message, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def reason(error):
    """Why an operation failed: the system's words where it has some, else the exception's."""
    if number := re.search(r"\(os error (\d+)\)", str(error)):          # as Rust tells it
        return os.strerror(int(number[1]))
    return getattr(error, "strerror", None) or one_line(error) or type(error).__name__


def listed(names, limit=4):
    """The names in a row; of more than `limit` the first ones, "and 3 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def sync(path):
    """Wait until a file's content, or a folder's list of names, is on the disk itself.

    File systems that cannot sync a folder are left alone. Raises OSError where a write fails.
    """
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(at)


def write_atomically(path, write):
    """Call write(temporary path), then move the file into place.

    A reader of `path` sees the old file or the new one, never a part, also after a power cut. Its
    permissions are those of any new file, whatever `write` made of them. All that `write` leaves
    beside the file it was given goes. Raises InputError where the folder cannot be written, the
    disk is full, or `path` is no file; what was there is untouched then.
    """
    path = Path(path)
    # a folder, since libraries put temporary files of their own beside what they write
    workshop = path.parent / f".{path.name}.{token_hex(4)}{PARTIAL}"
    try:
        if path.exists() and not path.is_file():    # or root would put a file in a device's place
            raise InputError(f"{path} is a folder or a device, no file; give the name of a file.")
        workshop.mkdir(parents=True)
        temporary = workshop / path.name
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)       # what the umask allows
        write(temporary)
        sync(temporary)
        with suppress(OSError):         # some file systems have no permissions
            temporary.chmod(mode)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be written ({reason(error)}); "
            "choose another folder or free some space.") from None
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def remove_partial_writes(folder):
    """Remove what writes that were killed left in a folder. Call it under the folder's lock."""
    for path in Path(folder).glob(f".*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def write_json(path, value):
    """Write value as indented JSON, whole or not at all. Raises InputError."""
    write_atomically(path, lambda f: f.write_text(json.dumps(value, indent=2) + "\n"))


def write_text(path, text):
    """Write a text in UTF-8, whole or not at all; what UTF-8 lacks, escaped. Raises InputError."""
    write_atomically(path, lambda f: f.write_text(text, encoding="utf-8",
                                                  errors="backslashreplace"))


def in_unicode(text):
    """A text in which half a surrogate pair, which UTF-8 lacks, is a replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_bytes(path, limit=2 ** 28):
    """The content of a file. Raises InputError where there is none, or it is no file of that size.

    limit: in bytes. A pipe or a device is refused without being opened, since it may never end.
    """
    path = Path(path)
    try:
        about = path.stat()
        if stat.S_ISREG(about.st_mode) and about.st_size > limit:
            raise InputError(f"{path} has {about.st_size:,} bytes, and {limit:,} are the limit; "
                             "it is not what its name says, give another file.")
        if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
            raise InputError(f"{path} is a pipe or a device, no file; give a file.")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing; give the folder of a run or of a checkpoint.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); "
                         "make it readable, or give another folder.") from None


def read_json(path):
    """The value in a JSON file, in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises InputError where the file is missing, unreadable, damaged, or a pointer that git-lfs
    left in its place.
    """
    path = Path(path)
    content = read_bytes(path)
    if content.startswith(LFS_POINTER.encode()):
        raise InputError(f"{path} is a git-lfs pointer, not the file itself; "
                         f"run git lfs pull in {path.parent}.")
    try:
        return json.loads(content)
    except (RecursionError, ValueError) as error:       # ValueError: no JSON, or no text at all
        raise InputError(f"{path} is damaged ({one_line(error)}); "
                         "restore it, or give another folder.") from None


def is_number(x, low=-math.inf, high=math.inf, kind=(int, float)):
    """Whether x, from JSON, is a finite number in this range, and no bool."""
    return (isinstance(x, kind) and not isinstance(x, bool) and low <= x <= high
            and abs(x) < math.inf)


def read_lines(path):
    """The lines of a file; none where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def read_text(path, source="--data"):
    """The text in a file that the flag `source` named, without a byte order mark.

    Raises InputError.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); check {source}.") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is not UTF-8 text; convert it, or leave it out of {source}.") from None
