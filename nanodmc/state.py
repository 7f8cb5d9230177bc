"""The tensors that --resume goes on from: a folder in PyTorch's distributed checkpoint format.

Nothing in the folder is trusted: its files have checksums, and its index, which is a pickle, may
name nothing but a few harmless classes.
"""

import os
import pickle
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from nanodmc.files import InputError, read_bytes, reason, sync
from nanodmc.parallel import first_decides, rank_count, this_rank
from nanodmc.records import curve_until, read_figures
from nanodmc.weights import verify

# of tensors only: PyTorch would unpickle what an index calls bytes
METADATA = {"ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"}
ALLOWED = {**dict.fromkeys(METADATA, "torch.distributed.checkpoint.metadata"),
           "_StorageInfo": "torch.distributed.checkpoint.filesystem", "Size": "torch",
           "float32": "torch", "bfloat16": "torch", "_get_layout": "torch.serialization",
           "PosixPath": "pathlib"}


class Unpickler(pickle.Unpickler):
    """Finds no class but those that the index of a saved state is made of."""

    def find_class(self, module, name):
        if ALLOWED.get(name) == module.removesuffix("._local"):       # pathlib's of Python 3.13
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a saved state")


class Reader(dcp.FileSystemReader):
    """A FileSystemReader that executes nothing from the folder and reads nothing outside it."""

    def read_metadata(self, *args, **kwargs):
        with (self.path / ".metadata").open("rb") as file:
            metadata = Unpickler(file).load()
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"{info.relative_path} lies outside the saved state")
            if not (self.path / info.relative_path).is_file():
                raise FileNotFoundError(info.relative_path)
        metadata.storage_meta.load_id = self.load_id
        return metadata


@contextmanager
def writing(folder):
    """Raises InputError where something in the folder cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        raise InputError(f"{folder} cannot be written ({root_reason(error)}); free some space, "
                         "then --resume: the state saved before is whole.") from None


def root_reason(error):
    """files.reason of what led to a failed write, wherever PyTorch keeps it."""
    # a CheckpointException has the errors of all ranks
    errors = [first for first, _ in getattr(error, "failures", {}).values()] or [error]
    for e in errors:
        if e.__context__ is not None:           # which led to it
            errors.append(e.__context__)
        if isinstance(e, OSError) and e.errno:
            return os.strerror(e.errno)
    if any("enforce fail" in str(e) for e in errors):       # of the file that torch writes
        return "a file was cut short, as on a full disk"
    return reason(errors[0])


def checksums(folder):
    """The CRC-32 of every file in a folder of tensors, by name, in hex digits."""
    sums = {}
    for path in sorted(folder.iterdir()):
        sums[path.name], block = 0, bytearray(2 ** 20)
        with path.open("rb") as file:
            while size := file.readinto(block):
                sums[path.name] = zlib.crc32(memoryview(block)[:size], sums[path.name])
    return {name: f"{crc:08x}" for name, crc in sums.items()}


def save_tensors(folder, tensors):
    """Write tensors, those of all ranks, and wait until they are on the disk.

    Returns the checksums of the files, on the first rank.
    """
    dcp.save(tensors, checkpoint_id=folder, no_dist=rank_count() == 1)
    if this_rank():
        return None
    for path in (*folder.iterdir(), folder, folder.parent):
        sync(path)
    return checksums(folder)


def load_tensors(folder, tensors, files, remedy):
    """Read what `save_tensors` wrote, on any number of ranks, into tensors of the same names.

    files: the checksums; None: older versions made none. Raises InputError where it is damaged,
    with `remedy`: what to do about it.
    """
    def check():
        for path in folder.iterdir():
            if not path.is_file():
                raise InputError(f"{path} is no file; {remedy}.")
        if files is not None and checksums(folder) != files:
            raise InputError(f"{folder} is damaged (its checksums are others); {remedy}.")
        read_bytes(folder / ".metadata")

    try:
        first_decides(check)
        dcp.load(tensors, storage_reader=Reader(folder), no_dist=rank_count() == 1)
    except InputError:
        raise
    except (Exception, CheckpointException) as error:          # many kinds for a damaged file
        raise InputError(f"{folder} is damaged ({type(error).__name__}); {remedy}.") from None


def check_weights(path, remedy):
    """Raises InputError where the weights in a folder cannot be read, or are not those saved.

    Of older versions, which made no checksum, only the former is known.
    """
    try:
        verify(path, needed=False)
    except InputError as error:
        raise InputError(f"{str(error).partition(';')[0]}; {remedy}.") from None


def whole_phases(out, phases, remedy):
    """How many phases, from the first one on, left whole weights, figures and curve in a folder."""
    for index, phase in enumerate(phases):
        try:
            for folder in phase.results:
                check_weights(out / folder, remedy)
            if phase.out:
                read_figures(out / phase.out / "figures.json")
            curve_until(out / "metrics.jsonl", phases, index + 1, 0, remedy)
        except InputError:
            return index
    return len(phases)
