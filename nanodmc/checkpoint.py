"""Checkpoints in Hugging Face's layout: reading, writing, and finding them."""

import json
import os
import re
import shlex
import warnings
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch

import dmc
from nanodmc.cli import installing, interpreter, typed
from nanodmc.config import (
    SHAPES,
    checked_config,
    config_from_json,
    config_to_json,
    dtype_name,
)
from nanodmc.files import (
    InputError,
    one_line,
    read_json,
    remove_partial_writes,
    write_atomically,
    write_json,
)
from nanodmc.variants import ops_of
from nanodmc.weights import (
    converting,
    plainly,
    read_weights,
    verify,
    weight_files,
    write_safetensors,
)

RELEASED = re.compile(r"nvidia/Llama-2-(7B|13B)-DMC-[48]x", re.IGNORECASE)
TRAVELS = Path(dmc.__file__), Path(__file__).with_name("modeling_dmc.py")      # for transformers

# ----------------------------------------------------------------------------------------- files

def save(model, path, tokenizer=None, shard_bytes=5 * 10 ** 9, progress=None, **facts):
    """Write a checkpoint: safetensors, config.json, and the files of the Tokenizer given.

    Beside a DMC model go the two files by which Hugging Face's transformers opens it.
    facts: for config.json, such as the CR reached. More than shard_bytes of weights are cut into
    shards with an index; progress(bytes written, bytes in all) is called after each. A kill at any
    moment leaves the old checkpoint or the new one, since the weights' file repeats config.json and
    shards get names that are free. Raises InputError where the folder cannot be written; the old
    checkpoint is untouched then. Call it under a lock: what killed writes left in the folder goes.
    """
    path, config = Path(path), config_to_json(model.config, **facts)
    if tokenizer is not None:
        config |= tokenizer.special_ids
    shards, size = [{}], 0
    for name, p in model.named_parameters():                    # tied weights once
        size += p.nbytes
        if shards[-1] and size > shard_bytes:
            shards, size = [*shards, {}], p.nbytes
        key = name if name == "lm_head.weight" else "model." + name
        shards[-1][key] = p.detach().contiguous()
    config["torch_dtype"] = dtype_name(p)
    remove_leftovers(path)
    for source in TRAVELS if model.config.dmc else ():
        content = source.read_bytes()
        write_atomically(path / source.name, lambda f, content=content: f.write_bytes(content))
    own, names, written = json.dumps(config), free_names(path, len(shards)), 0
    total = sum(p.nbytes for p in model.parameters())
    for name, weights in zip(names, shards, strict=True):
        write_atomically(
            path / name, lambda f, weights=weights: write_safetensors(weights, f, own))
        written += sum(w.nbytes for w in weights.values())
        if progress is not None:
            progress(written, total)

    # From here on the new weights count; beside an old single file, from when it is gone.
    # Each write is on the disk before the next line, so nothing goes before what replaces it.
    index = path / "model.safetensors.index.json"
    if len(shards) > 1:
        places = {key: name for name, weights in zip(names, shards, strict=True) for key in weights}
        write_json(index, {"metadata": {"total_size": total}, "weight_map": places})
    else:
        index.unlink(missing_ok=True)
    for file in path.glob("model*.safetensors"):
        if file.name not in names:
            file.unlink()
    write_json(path / "config.json", config)
    for name, content in (tokenizer.files if tokenizer is not None else {}).items():
        write_atomically(path / name, lambda f, content=content: f.write_bytes(content))


def remove_leftovers(path):
    """Remove what saves that were killed left in a folder, also those of older versions."""
    remove_partial_writes(path)
    for file in path.glob("model*.safetensors.partial"):
        file.unlink()
    for file in path.glob(".tmp??????"):        # safetensors' own, as large as the model
        if file.is_file() and not file.is_symlink():
            with file.open("rb") as f:
                start = f.read(64)
            if start[8:].startswith(b'{"__metadata__":'):
                file.unlink()


def free_names(path, shards):
    """File names for so many shards, none of which a file in the folder has; a single one's."""
    if shards == 1:
        return ["model.safetensors"]
    stems = ("model" if i == 0 else f"model-{i}" for i in count())
    stem = next(s for s in stems if not any(path.glob(f"{s}-?????-of-?????.safetensors")))
    return [f"{stem}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]


def load(path, ops=dmc, device=None, dtype=None, verified=False, **changes):
    """The Transformer in a folder in Hugging Face's layout. dtype None: as stored.

    changes: of its Config, such as dmc=True before a retrofit. Weights that need no conversion stay
    mapped to their file. verified: `verify` them first, which takes as long as loading. Raises
    InputError where files are missing or damaged, where a tensor is missing, unexpected or
    misshapen, and for other models. Warns of weights that are not finite.
    """
    path, weights, saved = Path(path), {}, None
    if verified:
        verify(path)
    for file in weight_files(path):
        tensors, own = read_weights(file)
        weights, saved = weights | tensors, own or saved
    weights = {name.removeprefix("model."): w for name, w in weights.items()
               if not name.endswith("rotary_emb.inv_freq")}
    config_file = path / "config.json"
    facts = read_json(config_file) if config_file.exists() or not saved else saved
    if saved and saved != facts:        # a kill between two files; or somebody edited one
        warnings.warn(f"{config_file} differs from what was saved with the weights, which is used.",
                      stacklevel=2)
        facts = saved
    config = checked_config(**{**vars(config_from_json(facts, config_file)), **changes})
    if config.n_layer > len(weights):       # said before that many layers are built
        raise InputError(f"{path} holds {len(weights)} tensors, too few for {config.n_layer} "
                         "layers; fetch the rest of it.")
    try:
        with torch.device("meta"):
            model = dmc.Transformer(config, ops_of(config, ops))
    except RuntimeError:
        raise InputError(
            f"{config_file} has sizes beyond those of any tensor; restore it.") from None
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = weights.pop("lm_head.weight", None) if config.tie_embeddings else None
    check_weights(path, expected, weights, tied)
    dtype = dtype or weights["embed_tokens.weight"].dtype
    weights = {name: w.to(device=device, dtype=dtype) for name, w in weights.items()}
    if bad := [name for name, w in weights.items()
               if not all(x.isfinite() for x in torch.aminmax(w))]:
        warnings.warn(f"{path} has weights that are NaN or infinite, in {plainly(bad)}; "
                      "what the model says will be useless.", stacklevel=2)
    model.load_state_dict(weights, assign=True, strict=False)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def check_weights(path, expected, weights, tied):
    """Raises InputError unless every tensor is accounted for. expected: shapes by name.

    tied: an output matrix, or None, in the file of a model whose embedding serves as one.
    """
    floats = torch.float16, torch.bfloat16, torch.float32, torch.float64
    if others := [f"{name} ({w.dtype})" for name, w in weights.items() if w.dtype not in floats]:
        raise InputError(f"{path} has quantized or other unsupported weights: {plainly(others)}; "
                         "fetch them in bf16 or fp32.")
    wrong = {name: tuple(w.shape) for name, w in weights.items()
             if name in expected and tuple(w.shape) != expected[name]}
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [f"{name} {n}, not {expected[name]}" for name, n in wrong.items()]}
    if any(problems.values()):
        told = "; ".join(f"{kind}: {plainly(names)}" for kind, names in problems.items() if names)
        raise InputError(f"{path} has other tensors than its config.json says; {told}; "
                         "restore the files.")
    if tied is not None and not torch.equal(tied, weights["embed_tokens.weight"]):
        raise InputError(f"{path} ties the output matrix to the embedding, yet holds another "
                         "lm_head.weight; correct tie_word_embeddings in its config.json.")


# ---------------------------------------------------------------------------------------- models

def random_model(config, ops=dmc, device=None, dtype=torch.bfloat16):
    """A Transformer with random weights, from PyTorch's seed: to measure speed and memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)          # weights are made in their dtype, never in a larger one
    try:
        with torch.device(device or "cpu"):
            return dmc.Transformer(config, ops)
    finally:
        torch.set_default_dtype(before)


def folder_of(file):
    """The folder whose checkpoint a file belongs to. Raises InputError where it does not."""
    with suppress(InputError):
        if file in weight_files(file.parent) or file.suffix == ".json":
            return file.parent
    raise InputError(f"{file} is no folder, and no file of the checkpoint that is loaded from its "
                     "folder; give the folder of a checkpoint.")


def locate(name):
    """The folder of a checkpoint: `name` itself, or the place of llama2-7b or org/name in a cache.

    A file of a checkpoint stands for its folder. The cache is Hugging Face's; a model that is not
    in it is fetched if huggingface_hub is installed. Raises InputError where that is impossible.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        return folder_of(Path(name))
    repo = f"meta-llama/{name.replace('llama2', 'Llama-2')}-hf" if name in SHAPES else name
    if size := RELEASED.fullmatch(repo):
        folder, llama = repo.split("/")[1], f"Llama-2-{size[1].lower()}-hf"
        raise InputError(
            f"{repo} is in Megatron's layout; fetch it and its tokenizer with: hf download {repo} "
            f"--local-dir {folder} && hf download meta-llama/{llama} --include 'tokenizer*' "
            f"--local-dir {llama}, then convert it with: {converting(folder, llama)}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or Path(name).exists():
        raise InputError(f"{name} is no folder, and no model's name; give the folder of a "
                         f"checkpoint, {', '.join(SHAPES)}, or org/name.")
    env = os.environ
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(env.get("HF_HUB_CACHE") or Path(home).expanduser() / "hub").expanduser()
    with suppress(OSError, InputError):
        cached = cache / ("models--" + repo.replace("/", "--"))
        folder = cached / "snapshots" / (cached / "refs/main").read_text().strip()
        weight_files(folder)
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        fetch = shlex.join([re.sub("[^/]+$", "hf", interpreter()), "download", repo, "--include"])
        raise InputError(
            f"{name} is no folder, and {repo} is not in {cache}; fetch it with: "
            f"{installing('huggingface_hub')} && {fetch} '*.json' '*.safetensors'") from None
    try:
        for patterns in (["*.json", "*.safetensors"], ["*.json", "pytorch_model*.bin"]):
            folder = Path(snapshot_download(repo, allow_patterns=patterns))
            if any(folder.glob("*.safetensors")):
                break                                   # older models have pickles only
        return folder
    except Exception as error:      # its many kinds: no network, no such model, no licence accepted
        raise InputError(
            f"{repo} could not be fetched ({type(error).__name__}: {one_line(error)}); "
            "check the name, the network, and for models under a licence hf auth login.") from None


def runs_by_number():
    """The folders runs/1, runs/2, ... that exist, in order."""
    runs = (p for p in Path("runs").glob("*") if re.fullmatch("[0-9]+", p.name))
    return sorted(runs, key=lambda p: int(p.name))


COMPRESSED = re.compile(r"cr([0-9]+(?:\.[0-9]+)?(?:e\+[0-9]+)?)")      # what runs name a model


def find_checkpoint(name):
    """The folder of a model: `name`, or the most compressed one of the run named, or of the newest.

    Raises InputError where there is none.
    """
    for run in [Path(name)] if name else reversed(runs_by_number()):
        names = {p.parent: COMPRESSED.fullmatch(p.parent.name) for p in run.glob("cr*/config.json")}
        if kept := [folder for folder, name in names.items() if name]:
            return max(kept, key=lambda folder: float(names[folder][1]))
    if not name:
        raise InputError("there is no finished run in runs; train one with "
                         f"{typed('train.py')}, or name a model with --ckpt.")
    return locate(name)
