"""Files of text become documents, whatever kind of file they are in."""

import glob
import gzip
import io
import json
import lzma
import os
import re
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from nanodmc.cli import installing
from nanodmc.files import InputError, reason

HEAD = 2 ** 14                   # characters that are looked at before a file is read
MAGIC = {                        # packing -> how such a file begins; no UTF-8 text begins like this
    ".gz": re.compile(rb"\x1f\x8b"),
    ".xz": re.compile(rb"\xfd7zXZ\0|\x5d\0\0"),                    # the second: its older format
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")}     # a frame, one to skip
TOO_LARGE = ("{} takes more memory to read than there is; cut it into smaller files, or leave it "
             "out of --data.")
JSON_LINES, JSON = (".jsonl", ".ndjson", ".jsonlines"), (".json",)
KEY = r'\{\s*"(?:[^"\\\n]|\\.)*"\s*:'
BEGINS_AS_JSON = re.compile(rf'\s*(?:{KEY}|\[\s*(?:{KEY}|"(?:[^"\\\n]|\\.)*(?:"\s*[,\]]|\Z)))')


# ------------------------------------------------------------------------------------ which files

def standard_library():
    """The Python sources of the running interpreter, without its tests: about 12 MB everywhere."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return sorted(f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts))


def below(folder):
    """The files in a folder and in those below it. What is hidden is left out."""
    return sorted(f for f in folder.rglob("*") if f.is_file()
                  and not any(part.startswith(".") for part in f.relative_to(folder).parts))


def text_files(patterns):
    """The files that --data names: themselves, all below a folder, or a pattern's matches.

    Raises InputError where there is none.
    """
    found = []
    for pattern in patterns:
        # Path.glob takes no absolute pattern
        try:
            names = ([pattern] if Path(pattern).exists()
                     else sorted(glob.glob(pattern, recursive=True)))  # noqa: PTH207
        except OSError as error:         # such as a name that is too long
            raise InputError(f"{pattern} cannot be read ({reason(error)}); check --data.") from None
        if not names:
            raise InputError(f"{pattern} cannot be read (no such file); check --data.")
        if names == [pattern] and not (Path(pattern).is_file() or Path(pattern).is_dir()):
            raise InputError(f"{pattern} is a device or a pipe, which cannot be read twice; "
                             "give a file with --data.")
        for path in map(Path, names):
            found += below(path) if path.is_dir() else [path] if path.is_file() else []
    if not found:
        raise InputError("there is no file to train on; give text files with --data.")
    return list(dict.fromkeys(found))


# -------------------------------------------------------------------------------- what is in a file

class Form(NamedTuple):
    """How a file is read, by its name and by how it begins."""

    packing: str     # ".gz", ".xz", ".zst" or ""
    kind: str        # "lines": of JSON; "json": one value; "pages": .txt; "whole": one document
    as_ever: bool    # whether the first version of this module read it in the same way


def memory():
    """The bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def form_of(path):
    """The Form of a file. Raises InputError where it is not what its name says.

    So it does where a file is read as a whole and has more bytes than there is memory.
    """
    with unpacked(path, "") as (_, file):
        start = file.read(8)
    name, suffix = path.name.lower(), path.suffix.lower()
    packing = next((p for p, magic in MAGIC.items() if magic.match(start)), "")
    if suffix in MAGIC:
        if suffix != packing and start:
            raise InputError(f"{path} cannot be read (it is no {suffix} file); "
                             "rename it, or leave it out of --data.")
        packing, name = suffix, name.removesuffix(suffix)
    with unpacked(path, packing, "utf-8") as (stream, _):
        head = stream.read(HEAD)
    kind = kind_of(Path(name).suffix, head.removeprefix("\ufeff"), path)
    if kind in ("whole", "json") and not packing and path.stat().st_size > memory():
        raise InputError(TOO_LARGE.format(path))
    before = path.suffix if path.suffix in MAGIC else ""
    named = (path.with_suffix("") if before else path).suffix
    as_ever = (before == packing != ".zst" and not head.startswith("\ufeff")
               and kind == {".txt": "pages", ".jsonl": "lines"}.get(named, "whole"))
    return Form(packing, kind, as_ever)


def kind_of(suffix, head, path):
    """The kind of a file with this suffix, in small letters, and this beginning."""
    if "ustar" in head[200:300] and "\0" in head[:200]:
        raise InputError(f"{path} is an archive of files; unpack it, or leave it out of --data.")
    if suffix not in JSON_LINES + JSON and not BEGINS_AS_JSON.match(head):
        return "pages" if suffix == ".txt" else "whole"
    if head.lstrip().startswith("["):
        return "json"
    first, newline, _ = head.lstrip().partition("\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        # an object in several lines, or a first line that is longer than the head
        return "json" if newline and suffix not in JSON_LINES else "lines"
    return "lines"


# ------------------------------------------------------------------------------------- unpacking

class ZstdReader(io.RawIOBase):
    """The bytes in an open .zst file: of all its frames, each of which must have its end."""

    def __init__(self, file):
        try:
            import zstandard
        except ImportError:
            raise InputError("reading .zst needs a library that is not installed; "
                             f"{installing('zstandard')}.") from None
        # by default, windows above 128 MB are refused: what zstd --long=31 writes has 2 GB
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=2 ** 31)
        self.file, self.frame, self.packed, self.bytes = file, None, b"", memoryview(b"")
        self.failure = zstandard.ZstdError

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.bytes:
            self.packed = self.packed or self.file.read(2 ** 14)
            if not self.packed:
                if self.frame:
                    raise EOFError
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.bytes = memoryview(self._unpack())
            self.packed = self.frame.unused_data
            self.frame = None if self.frame.eof else self.frame
        size = min(len(buffer), len(self.bytes))
        buffer[:size], self.bytes = self.bytes[:size], self.bytes[size:]
        return size

    def _unpack(self):
        try:
            return self.frame.decompress(self.packed)
        except self.failure as error:
            if "memory" in str(error).lower():
                raise MemoryError from None
            raise


def opened(file, packing):
    """The bytes that are packed in an open file."""
    if packing == ".zst":
        return io.BufferedReader(ZstdReader(file), 2 ** 16)
    return {".gz": gzip.open, ".xz": lzma.open, "": lambda file: file}[packing](file)


@contextmanager
def unpacked(path, packing, encoding="utf-8-sig"):
    """The text in a file, as a stream, and the open file. Raises InputError for what fails.

    In the default encoding, a byte order mark is no text.
    """
    try:
        with path.open("rb") as file:
            if packing and not file.peek(1):         # which gzip takes for a whole one
                raise EOFError
            with io.TextIOWrapper(opened(file, packing), encoding=encoding) as stream:
                try:
                    yield stream, file
                except (UnicodeDecodeError, InputError):
                    if packing:          # the cause may be damage, which only the sum shows, behind
                        stream.buffer.read(2 ** 26)
                    raise
    except InputError:
        raise
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and not packing:
            raise InputError(f"{path} is cut short, in the middle of a character; fetch it anew, "
                             "or leave it out of --data.") from None
        raise InputError(
            f"{path} is not UTF-8 text; convert it, or leave it out of --data.") from None
    except EOFError:
        raise InputError(f"{path} is cut short: what is packed in it has no end; fetch it anew, "
                         "or leave it out of --data.") from None
    except MemoryError:
        raise InputError(TOO_LARGE.format(path)) from None
    except gzip.BadGzipFile as error:                # the file itself could be read
        raise InputError(damage(path, error)) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}); check --data.") from None
    except Exception as error:      # each library has its own kind for a damaged file
        raise InputError(damage(path, error)) from None


def damage(path, error):
    """The sentence on a file that a library cannot unpack."""
    if "dictionary" in str(error).lower():
        return f"{path} is packed with a dictionary; unpack it, or leave it out of --data."
    return f"{path} is damaged ({error}); fetch it anew, or leave it out of --data."


# -------------------------------------------------------------------------------------- documents

def no_json(path, line, at_end=False):
    ends = ", where it ends; if it was cut short, fetch it anew," if at_end else "; mend it,"
    return InputError(f"{path} is no JSON in line {line}{ends} or leave it out of --data.")


def json_entries(stream, kind, path):
    """Yield the values in a stream of JSON, each with where it is: lines, or what is in a list."""
    if kind == "lines":
        for number, line in enumerate(stream, 1):
            if line := line.strip().removeprefix("\ufeff"):      # files that were put in a row
                try:
                    yield json.loads(line), f"in line {number}"
                except (ValueError, RecursionError):
                    raise no_json(path, number, at_end=not stream.read(1)) from None
        return
    text = stream.read()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        at_end = error.msg.startswith("Unterminated") or not text[error.pos:].strip()
        raise no_json(path, error.lineno, at_end) from None
    except (ValueError, RecursionError):
        raise no_json(path, 1) from None
    for number, entry in enumerate(value if isinstance(value, list) else [value], 1):
        yield entry, f"in entry {number}"


def json_texts(stream, kind, path, field):
    """Yield the texts in a stream of JSON: what each entry has under `field`, or is itself."""
    for entry, where in json_entries(stream, kind, path):
        text = entry if isinstance(entry, str) else (
            entry.get(field, 0) if isinstance(entry, dict) else 0)
        if not isinstance(text, str | None):
            raise InputError(f"{path} has no text under {field} {where}; name where it is with "
                             "--field, or leave the file out of --data.")
        if text is not None:
            yield text


def pages(stream):
    """Yield the texts in a stream between which a line holds nothing but a form feed."""
    lines = []
    for line in stream:
        if line == "\f\n":
            yield "".join(lines)
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def documents(path, field):
    """Yield the texts in a file, each with the bytes of the file that were read so far.

    Files of JSON hold one under `field` in each line, or in each entry of a list. In .txt, a line
    of nothing but a form feed stands between two. Any other file is one. All may be packed by
    gzip, xz or zstd. Case does not matter in names, and what begins as JSON or is packed is read so
    without such a name. Raises InputError where a file cannot be read, is cut short, or is not
    what its name says.
    """
    packing, kind, _ = form_of(path)
    with unpacked(path, packing) as (stream, file):
        if kind in ("lines", "json"):
            texts = json_texts(stream, kind, path, field)
        else:
            texts = pages(stream) if kind == "pages" else iter([stream.read()])
        for text in texts:
            yield text, file.tell()
