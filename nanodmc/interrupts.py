"""What must be right before a command's other imports, which take seconds or need a newer Python.

Until catch() is called after them, Ctrl-C ends the command without a traceback.
"""

import signal
import sys
import threading

if sys.version_info < (3, 10):  # noqa: UP036 - said here, since other imports fail there
    version = ".".join(map(str, sys.version_info[:2]))
    print(f"This needs Python 3.10 or newer, and {sys.executable} is {version}; "
          "make the environment with a newer one.", file=sys.stderr)
    sys.exit(2)

OURS = (threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler)


def catch():
    """From now on, Ctrl-C is a KeyboardInterrupt again."""
    if OURS:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if OURS:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
