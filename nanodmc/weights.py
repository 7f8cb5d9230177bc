"""Files of weights: which ones a folder has, what they hold, and whether they are as saved."""

import json
import re
import stat
import zlib
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanodmc.cli import typed
from nanodmc.files import LFS_POINTER, InputError, listed, one_line, read_json, reason


def weight_files(path):
    """The files of a checkpoint's weights: one, or an index's shards. Raises InputError."""
    for single in (path / "model.safetensors", path / "pytorch_model.bin"):  # pickles last
        index = single.with_name(single.name + ".index.json")
        if is_special(single):
            raise InputError(f"{single} is a pipe or a device, no file; fetch the weights.")
        if single.is_file():
            return [single]
        if index.is_file() or is_special(index):
            try:
                names = sorted(set(read_json(index)["weight_map"].values()))
                files = [path / Path(name).name for name in names]
            except InputError:
                raise
            except (KeyError, TypeError, AttributeError, ValueError):
                raise InputError(f"{index} is no index of shards; restore it.") from None
            if missing := [file.name for file in files if not file.is_file()]:
                raise InputError(f"{path} lacks {plainly(missing)}, which {index.name} names; "
                                 "fetch the rest of the checkpoint.")
            return files
    if any(path.glob("mp_rank_*")) or any(path.glob("iter_*")):
        raise InputError(f"{path} is in Megatron's layout; convert it with: {converting(path)}")
    raise InputError(f"{path} holds no model.safetensors and no pytorch_model.bin; "
                     "give the folder of a checkpoint.")


def converting(folder, tokenizer="FOLDER"):
    """The command line that makes a checkpoint of a folder in Megatron's layout."""
    return typed("generate.py", "--convert", folder, "--tokenizer", tokenizer, "--out",
                 f"{folder}-converted")


def is_special(path):
    """Whether a path leads to a pipe, a device or a socket, which may never end."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def plainly(names):
    """Names from files in a row, without characters that command terminals."""
    return listed([str(name) if str(name).isprintable() else ascii(name) for name in names])


# --------------------------------------------------------------------------------------- reading

OTHER_FILES = {         # how what is found in the place of weights begins, and what to say of it
    LFS_POINTER.lower().encode(): "a git-lfs pointer, not the weights; run git lfs pull there",
    b"<!doctype": "a web page, not the weights; fetch the file itself",
    b"<html": "a web page, not the weights; fetch the file itself",
    b"gguf": "in the GGUF format; fetch the model's safetensors"}
ZIP = b"PK\x03\x04"     # how torch.save's files begin, but for those of its old format


def is_zip(file):
    """Whether a file begins as torch.save's do.

    Raises InputError for what is known to be no weights, and OSError where it cannot be read.
    """
    with file.open("rb") as f:
        start = f.read(64)
    for beginning, says in OTHER_FILES.items():
        if start.lower().startswith(beginning):
            raise InputError(f"{file} is {says}.")
    return start.startswith(ZIP)


def read_weights(file):
    """The tensors in a file, by name, and the config.json that `save` put in, or None.

    They stay mapped to the file, unless that is in PyTorch's old format, which is read whole.
    Raises InputError for what cannot be read, is damaged, or holds more than weights.
    """
    try:
        zipped = is_zip(file)
        if file.suffix == ".safetensors":
            tensors, metadata = read_safetensors(file)
            return tensors, json.loads(metadata.get("config", "null"))
        tensors = torch.load(file, map_location="cpu", weights_only=True,       # no code
                             mmap=zipped)
    except InputError:
        raise
    except Exception as error:      # torch and safetensors raise many kinds
        raise InputError(f"{file} {what_is_wrong(error)}.") from None
    if not isinstance(tensors, dict):
        raise InputError(f"{file} holds a {type(tensors).__name__}, not tensors by their names; "
                         "save the model's state_dict.")
    if others := [f"{name} ({type(w).__name__})" for name, w in tensors.items()
                  if not (isinstance(name, str) and isinstance(w, torch.Tensor))]:
        raise InputError(f"{file} holds more than weights, not all of it is tensors: "
                         f"{plainly(others)}; save the model's state_dict.")
    if others := [f"{name} ({kind})" for name, w in tensors.items() if (kind := other_kind(w))]:
        raise InputError(f"{file} holds quantized or other unsupported weights: "
                         f"{plainly(others)}; fetch them in bf16 or fp32.")
    return tensors, None


def read_safetensors(file):
    """The tensors in a file, by name, mapped to it, and its metadata."""
    with safe_open(file, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - no dict
        return tensors, f.metadata() or {}


def other_kind(tensor):
    """What a tensor is if not plain numbers: "sparse", "quantized", "without data"; else None."""
    if tensor.is_meta:
        return "without data"
    if tensor.is_quantized:
        return "quantized"
    return "sparse" if tensor.layout != torch.strided or tensor.is_nested else None


def what_is_wrong(error):
    """What an exception says about the file of weights that could not be read, and what to do."""
    inner = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))     # below much advice
    says = f"({type(error).__name__}: {one_line(inner[1] if inner else error)})"
    if isinstance(error, OSError):
        return f"cannot be read ({reason(error)}); make it readable, or fetch it anew"
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return f"does not fit into memory {says}; free some, or choose a smaller model"
    if "Dtype not understood" in str(error):        # safetensors: a dtype that PyTorch lacks
        return f"has quantized weights {says}; fetch them in bf16 or fp32"
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return f"holds more than weights: {code[1]}; save the model's state_dict"
    if "TorchScript" in str(error):
        return "is a TorchScript program, not weights; save the model's state_dict"
    if re.search("unsupported class|unrecognized function|Can only build", str(error)):
        return f"holds more than weights {says}; save the model's state_dict"
    if isinstance(error, UnpicklingError) or "Invalid magic number" in str(error):
        return (f"is truncated or damaged, or was not written by torch.save {says}; "
                "fetch or write it anew")
    damage = "unexpected EOF|failed reading (zip|file)|corrupt"
    kinds = SafetensorError | EOFError | json.JSONDecodeError
    if isinstance(error, kinds) or re.search(damage, str(error)):
        return f"is truncated or damaged {says}; fetch or write it anew"
    return f"cannot be understood as weights {says}; fetch them as safetensors"


# --------------------------------------------------------------------------------------- writing

def write_safetensors(tensors, path, config):
    """Write tensors and the text of a config.json; the same ones give the same bytes.

    A checksum of both stands in the metadata, for `verify`.
    """
    metadata = {"checksum": checksum(tensors, config), "config": config, "format": "pt"}
    save_file(tensors, path, metadata=metadata)
    with path.open("r+b") as f:             # safetensors writes metadata in any order
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size)) | {"__metadata__": metadata}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the header has grown"
        f.seek(8)
        f.write(text.ljust(size))


def checksum(tensors, config):
    """CRC-32 of tensors, with their names, dtypes and shapes, and of a text, in hex digits."""
    crc = zlib.crc32(config.encode())
    for name in sorted(tensors):
        w = tensors[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {w.dtype} {tuple(w.shape)}".encode(), crc)
        crc = zlib.crc32(w.reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def verify(path, needed=True):
    """Raises InputError unless the weights in a folder are, bit for bit, what `save` wrote.

    And unless its config.json is the one that was saved with them. needed False: files without a
    checksum, as other programs and older versions write them, need only be readable.
    """
    for file in weight_files(Path(path)):
        read_weights(file)                  # says what is wrong where it cannot be read
        tensors, metadata = read_safetensors(file) if file.suffix == ".safetensors" else ({}, {})
        if "checksum" not in metadata:
            if not needed:
                continue
            raise InputError(f"{file} has no checksum to verify, since another program or an older "
                             "version wrote it; leave --verify out.")
        if checksum(tensors, metadata.get("config", "")) != metadata["checksum"]:
            raise InputError(f"{file} is damaged: its weights are not those that were saved; "
                             "restore it from a copy, or train the model anew.")
        facts = file.parent / "config.json"
        if read_json(facts) != json.loads(metadata["config"]):
            raise InputError(f"{facts} is not what was saved with {file.name}; restore it.")
