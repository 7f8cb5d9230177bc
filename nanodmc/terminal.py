"""What reaches a terminal: text that cannot command it, colours where wanted, and lost output."""

import codecs
import errno
import io
import os
import re
import sys
import time
from contextlib import contextmanager, suppress

COLOURS = ("\033[48;5;24m\033[97m", "\033[48;5;94m\033[97m", "\033[48;5;29m\033[97m")
RESET = "\033[0m"
MOVE_UP = "\033[A"           # of the bars that other libraries show, as when a model is fetched
ALLOWED = "|".join(map(re.escape, (*COLOURS, RESET, MOVE_UP, "\r")))

# all but tab and line feed: C0, DEL, C1, and what turns the direction of writing
COMMANDS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
OTHERS = re.compile(f"(?:{ALLOWED})|({COMMANDS})")


def visible(character):
    """A control character as one or more that can be seen."""
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)                        # control pictures, as in ␛
    return "\u2421" if code == 0x7f else f"<U+{code:04X}>"


def harmless(text):
    """A text in which no character commands a terminal: all but tab and line feed are visible."""
    return re.sub(COMMANDS, lambda match: visible(match[0]), text)


def to_show(text, stream=None):
    """A text from files, users or a model, as it may be printed: harmless on a terminal.

    stream: where it goes; None: stdout.
    """
    return harmless(text) if (stream or sys.stdout).isatty() else text


def moves(stream):
    """Whether a line on this stream can be overwritten: it is a terminal, and no dumb one."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colours(stream):
    """Whether this stream shows colours, and the user wants them (see no-color.org)."""
    return moves(stream) and not os.environ.get("NO_COLOR")


class ProgressLine:
    """A line on stderr every second, or every ten where lines cannot be overwritten.

    A subclass says what stands in it, as its text, and sets `shown` when it begins: the time of the
    latest line, by `clock`.
    """

    def __init__(self, clock):
        self.clock, self.stream, self.terminal = clock, sys.stderr, moves(sys.stderr)

    def show(self, now):
        """Print the line, if it is time."""
        if now - self.shown > (1 if self.terminal else 10):
            self.shown = now
            self._write(str(self))

    def clear(self):
        """Make room on the terminal for what comes next."""
        if self.terminal:
            self._write("")

    def _write(self, text):
        end = "\r" if self.terminal else "\n"
        print(f"{text:<79}" if self.terminal else text, end=end, file=self.stream, flush=True)


class CountLine(ProgressLine):
    """A line about how much is done. What is left follows from the rate."""

    def __init__(self, clock=time.perf_counter):
        super().__init__(clock)
        self.what = None

    def tell(self, what, done, total):
        """done of total; what: of what, as in "tokens scored"."""
        now = self.clock()
        if what != self.what:
            self.what, self.start, self.shown = what, now, now
        self.done, self.total, self.seconds = done, total, now - self.start
        self.show(now)

    def __str__(self):
        rest = self.total - self.done
        left = duration(self.seconds * rest / self.done) if self.done else "-"
        return f"{self.done:,}/{self.total:,} {self.what}  {left} left"


def duration(seconds):
    """Seconds as 4:05 (minutes), 4h05m, 4d05h or 104d; None as -."""
    if seconds is None:
        return "-"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes}:{int(seconds) % 60:02}"
    if minutes < 48 * 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days}d{hours:02}h" if days < 100 else f"{days}d"


def print_bytes(pieces):
    """Print a text as it comes, and a line's end. pieces: bytes, which may end in a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        print(to_show(decoder.decode(piece)), end="", flush=True)
    print(decoder.decode(b"", final=True))


class OutputLost(Exception):
    """What a command prints to stdout cannot be written any more."""

    def __init__(self, error):
        super().__init__(f"its output cannot be written ({error.strerror}); give it another place.")
        self.unread = error.errno == errno.EPIPE         # as by | head, which is no fault


class Screen:
    """A stream as commands print to it.

    A terminal gets harmless text, besides our own colours and what lines of progress need; so text
    that is not ours should go through to_show as well. The first write that fails raises
    OutputLost, unless `must` is False; whatever follows goes nowhere, and `lost` is that error.
    """

    def __init__(self, stream, must=True):
        self.stream, self.must, self.lost = stream, must, None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        shown = text
        if self.stream.isatty():
            shown = OTHERS.sub(lambda match: visible(match[1]) if match[1] else match[0], text)
        self._attempt(self.stream.write, shown)
        return len(text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, work, *arguments):
        if self.lost:
            return
        try:
            work(*arguments)
        except OSError as error:
            self.lost = OutputLost(error)
            drain(self.stream)
            if self.must:
                raise self.lost from None


class Closed(io.TextIOBase):
    """In the place of a stream that was closed before Python started."""

    def write(self, text):
        raise OSError(errno.EBADF, "it is closed")


def drain(stream):
    """Let what the stream still holds go nowhere, so that Python does not fail as it ends."""
    if stream in (sys.__stdout__, sys.__stderr__):
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


@contextmanager
def screens():
    """Meanwhile stdout and stderr are Screens, of which stdout must be written. Yields both."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Screen(before[0] or Closed()), Screen(before[1] or Closed(), False)
    try:
        yield sys.stdout, sys.stderr
    finally:
        sys.stdout, sys.stderr = before
