"""The folder of a run, claimed: no other process writes to it meanwhile."""

import os
from contextlib import suppress
from pathlib import Path

from nanodmc.checkpoint import runs_by_number
from nanodmc.files import InputError, read_json, reason
from nanodmc.locks import Lock
from nanodmc.parallel import first_decides


class Claim:
    """A run's folder `out`, locked by the first rank until `release`.

    A folder that it made and nobody filled goes then.
    """

    def __init__(self, out=None, resume=False):
        """out None: runs/N, with a number that nobody has. Raises InputError, on all ranks.

        resume: the folder must hold a run already; otherwise it must not.
        """
        self.lock, self.made = None, []
        self.out = Path(first_decides(lambda: str(self.taken(out, resume))))

    def taken(self, out, resume):
        """The folder, made if need be, and locked."""
        if resume and not (out / "run.json").exists():
            read_json(out / "run.json")                 # says what is wrong with it
        try:
            if not resume:
                out = self.make(out)
            self.lock = Lock(out / ".lock", str(out))
            if not resume and (out / "run.json").exists():
                raise InputError(f"{out} already holds a run; add --resume to continue it, or "
                                 "choose another --out.")
        except BaseException:
            self.release()
            raise
        return out

    def make(self, out):
        """Make a folder, or the next one that is free by its number, and return it."""
        numbers = (int(path.name) for path in runs_by_number())
        number = max(numbers, default=0) + 1
        while True:
            folder = out or Path("runs") / str(number)
            check_folder(folder)
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            try:
                folder.mkdir(parents=True, exist_ok=out is not None)
            except OSError as error:
                if isinstance(error, FileExistsError) and not out:    # somebody was faster
                    number += 1
                    continue
                raise InputError(f"{folder} cannot be made ({reason(error)}); choose another "
                                 "--out.") from None
            else:
                self.made = missing
                return folder

    def release(self):
        """Give the folder back. May be called again."""
        if self.lock is not None:
            self.lock.release()
        for folder in self.made:
            with suppress(OSError):                     # it is not empty
                folder.rmdir()


def check_folder(folder):
    """Raises InputError where a folder cannot be made, or not be written to. Makes nothing."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "may not be written to" if there.is_dir() else "is no folder"
        raise InputError(f"{folder} cannot be written ({there} {what}); choose another --out.")
