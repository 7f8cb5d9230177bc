"""The sole right to write to a run, a file of results or a cache, while a process does so."""

import fcntl
import glob
import os
import shutil
import socket
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

from nanodmc.files import PARTIAL, InputError, reason


class Lock:
    """Nobody else holds the lock of this name until it is released, or this process ends.

    It is a flock on a small file beside what it protects; the file says who holds it, and goes with
    the lock. A kill leaves the file, but not the lock. `with` releases it.
    """

    def __init__(self, path, what, wait=False):
        """path: of the small file. what: what it protects, for messages.

        wait: until it is free; else raises InputError where another process holds it. Where a file
        system has no locks, warns and goes on.
        """
        self.path = Path(path)
        try:
            self.file = self.opened(what, wait)
        except OSError as error:
            raise InputError(f"{what} cannot be written ({reason(error)}); choose another --out, "
                             "or free some space.") from None

    def opened(self, what, wait):
        """The lock's file, locked, with our name in it."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
                os.close(file)
                raise InputError(f"{what} is being written by {holder}; wait until it ends, or "
                                 "choose another --out.") from None
            except OSError as error:
                warnings.warn(f"{what} cannot be locked ({reason(error)}); see to it that no other "
                              "process writes there", stacklevel=4)
            if self.is_named(file):
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}, since "
                                f"{time.strftime('%Y-%m-%d %H:%M')}".encode(), 0)
                return file
            os.close(file)               # whoever held it removed it meanwhile

    def is_named(self, file):
        """Whether our path still leads to this open file."""
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(file))
        except FileNotFoundError:
            return False

    def release(self):
        """Give the lock back. May be called again."""
        if self.file is not None:
            if self.is_named(self.file):
                self.path.unlink()
            os.close(self.file)
            self.file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


@contextmanager
def only_writer(path):
    """Nobody else writes to this file of results meanwhile, under whatever link.

    What killed writes left beside it goes. Raises InputError where another process holds it.
    """
    path = path.resolve()
    with Lock(path.with_name(f".{path.name}.lock"), path):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        yield
