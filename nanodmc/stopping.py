"""What asks a run to stop and to save: signals, a terminal that hangs up, output that is lost."""

import signal
import sys
from contextlib import contextmanager, redirect_stdout

from nanodmc.cli import typed
from nanodmc.terminal import OutputLost

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end."""


class Lenient:
    """A terminal.Screen that calls lose() when it is lost, where it would raise OutputLost."""

    def __init__(self, screen, lose):
        self.screen, self.lose, self.lost = screen, lose, None

    def __getattr__(self, name):
        return getattr(self.screen, name)

    def write(self, text):
        return self.attempt(self.screen.write, text)

    def flush(self):
        self.attempt(self.screen.flush)

    def attempt(self, work, *arguments):
        try:
            return work(*arguments)
        except OutputLost as error:
            self.lost = error
            self.lose()


def heed(handler):
    """From now on these signals call handler(number, frame). A parent may ignore SIGHUP: nohup."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_at_signals():
    """Until `heeded`, signals end the command as Ctrl-C does: what is open is closed first."""
    heed(signal.default_int_handler)


@contextmanager
def heeded(run):
    """Meanwhile signals, and the loss of standard output, set run.stop.

    Where the run raises Stopped, having saved its state, this says so and how to go on.
    """
    ask = lambda *_: setattr(run, "stop", True)
    heed(ask)
    screen = Lenient(sys.stdout, ask)
    try:
        with redirect_stdout(screen):
            yield
    except Stopped:
        command = typed("train.py", "--resume", "--out", run.out, ranks=run.ranks)
        told = f"\nStopped, and saved. To go on:\n    {command}"
        print(told, file=screen, flush=True)
        if screen.lost:
            print(f"train.py: {screen.lost}{told}", file=sys.stderr, flush=True)
        raise
