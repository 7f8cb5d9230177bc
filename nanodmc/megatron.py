"""The DMC models that NVIDIA released, in Megatron's layout: read, checked, and saved in ours.

Theirs differ from ours in four points. Their control channel is the last one of a head, and ours
the first; `last_channel_first` moves it. Their importance has an offset, which is the variant
`nvidia`. Their query, key and value matrices are one, as are two of the MLP; and a file holds
settings beside the weights.
"""

import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

import dmc
from nanodmc.checkpoint import check_weights, save
from nanodmc.config import checked_config, shown
from nanodmc.control_pair import turned
from nanodmc.files import InputError, is_number, read_text, reason
from nanodmc.locks import Lock
from nanodmc.terminal import CountLine, to_show
from nanodmc.tokenizer import Tokenizer
from nanodmc.weights import is_zip, plainly, what_is_wrong

FILE = "model_optim_rng.pt"
GIVE = "give a checkpoint as NVIDIA released it"
WANTED = {              # what their settings are to say, where they say it
    "swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True, "rotary_percent": 1.0,
    "rotary_interleaved": False, "rotary_seq_len_interpolation_factor": None,
    "apply_layernorm_1p": False, "add_bias_linear": False, "add_qkv_bias": False,
    "qk_layernorm": False, "num_experts": None, "pipeline_model_parallel_size": 1,
    "dmc_is_stage_one": False}
SHARD_BYTES = 10 ** 9


def add_flags(parser):
    """The flags of --convert, besides those that other modes have too."""
    flags = parser.add_argument_group("released models")
    flags.add_argument("--convert", type=Path, metavar="DIR", help=(
        "turn a DMC model in Megatron's layout into a checkpoint for --ckpt, in the folder --out"))
    flags.add_argument("--tokenizer", type=Path, metavar="DIR", help=(
        "where the tokenizer.json of the model's Llama is"))


def convert(source, out, tokenizer):
    """Save the DMC model of Megatron in `source` as a checkpoint in the new folder `out`.

    tokenizer: a folder with the tokenizer.json of the Llama that it was made of. Raises InputError
    where one of the three does not fit.
    """
    if not out or not tokenizer:
        raise InputError("--convert needs --out, a new folder, and --tokenizer, the folder of the "
                         "model's tokenizer.json.")
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; name a new folder with --out.")
    words = Tokenizer.from_folder(tokenizer)
    model = read_model(source, words.vocab_size)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({reason(error)}); choose another --out.") from None
    line = CountLine()
    with Lock(out / ".lock", out):
        save(model, out, words, SHARD_BYTES, lambda done, total: line.tell(
            "MB written", done // 10 ** 6, total // 10 ** 6), converted_from=str(source))
    line.clear()
    count = sum(p.numel() for p in model.parameters())
    print(to_show(f"{out} has the model: {count:,} parameters."))


def read_model(source, vocab_size):
    """The Transformer in a folder or file of Megatron's. Its weights stay mapped where they can.

    vocab_size: of its tokenizer; more rows than that are padding. Raises InputError.
    """
    parts = [read_part(file) for file in files_of(Path(source))]
    settings = parts[0][0]
    config = config_of(settings, vocab_size, source)
    names = parts[0][1].keys()
    if any(tensors.keys() != names for _, tensors in parts):
        raise InputError(f"{source} has parts with different tensors; fetch it anew.")
    try:
        whole = {name: join(name, [tensors[name] for _, tensors in parts]) for name in names}
        weights = renamed(whole, config)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{source} has other tensors than its settings say "
                         f"({type(error).__name__}: {plainly([error.args[0]])}); {GIVE}.") from None
    with torch.device("meta"):
        model = dmc.Transformer(config)
    check_weights(source, {name: tuple(p.shape) for name, p in model.named_parameters()}, weights,
                  tied=None)
    model.load_state_dict(weights, assign=True)
    return model


# ------------------------------------------------------------------------------------- the files

def files_of(source):
    """The file of each tensor-parallel rank, in order. source: a folder of theirs, or a file."""
    if source.is_file():
        return [source]
    latest = source / "latest_checkpointed_iteration.txt"
    name = read_text(latest).strip() if latest.is_file() else ""
    iteration = source / (f"iter_{int(name):07}" if re.fullmatch("[0-9]{1,9}", name) else "release")
    for folder in (iteration, source):
        if files := sorted(folder.glob(f"mp_rank_*/{FILE}")):
            ranks = [file.parent.name for file in files]
            if ranks != [f"mp_rank_{rank:02}" for rank in range(len(files))]:
                raise InputError(f"{folder} holds {plainly(ranks)}, and not the ranks from 0 on of "
                                 "a model in one pipeline stage; fetch the rest of it.")
            return files
    raise InputError(f"{source} holds no mp_rank_00/{FILE}; {GIVE}.")


class Inert:
    """In the place of an object that nobody needs: it takes what comes, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_part(file):
    """The settings, a Namespace, and the tensors by name in one file.

    Nothing of what is pickled in it runs: of the classes that stand beside the tensors, settings
    become a Namespace and the known others are inert. Raises InputError for any further one.
    """
    try:
        if not is_zip(file):
            raise InputError(f"{file} is truncated or damaged, or not written by torch.save; fetch "
                             "it anew.")
        names = set(get_unsafe_globals_in_checkpoint(file)) - {"argparse.Namespace"}
        inert = {name for name in names if re.fullmatch(
            r"_io\.BytesIO|megatron\.core\.enums\.ModelType|numpy(\.\w+)+", name)}
        if others := sorted(names - inert):
            raise InputError(f"{file} holds more than weights and settings: {plainly(others)}; "
                             f"{GIVE}.")
        with safe_globals([(Namespace, "argparse.Namespace"), *((Inert, name) for name in inert)]):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except Exception as error:          # torch raises many kinds
        raise InputError(f"{file} {what_is_wrong(error)}.") from None
    model, settings = (state.get(key) if isinstance(state, dict) else None
                       for key in ("model", "args"))
    if not isinstance(model, dict) or not isinstance(settings, Namespace):
        raise InputError(f"{file} lacks a model and its settings; {GIVE}.")
    version = state.get("checkpoint_version")
    if not isinstance(version, int | float) or version < 2:
        raise InputError(f"{file} is of an older layout, or of none that is known; {GIVE}.")
    tensors = {name: w for name, w in model.items() if not str(name).endswith("_extra_state")}
    if others := [name for name, w in tensors.items()
                  if not (isinstance(name, str) and isinstance(w, torch.Tensor))]:
        raise InputError(f"{file} has no tensor at {plainly(others)}; {GIVE}.")
    return settings, tensors


# ------------------------------------------------------------------------------ what they mean

def config_of(settings, vocab_size, source):
    """The Config that their settings describe. Raises InputError where that is not our Llama."""
    has = vars(settings)
    for name, wanted in WANTED.items():
        found = has.get(name, wanted)
        if not isinstance(found, str | int | float | None) or found != wanted:
            raise InputError(f"{source} has {name} {shown(found)}, and {wanted!r} is all that "
                             f"works here; {GIVE}.")
    real = lambda name, usual: float(x) if is_number(x := has.get(name, usual)) else x
    heads = has.get("num_attention_heads")
    groups = has.get("num_query_groups") if has.get("group_query_attention") is True else heads
    window = has.get("dmc_window_size", 12)
    try:
        config = checked_config(
            vocab_size=vocab_size, n_layer=has.get("num_layers"), n_head=heads, n_kv_head=groups,
            dim=has.get("hidden_size"), ffn_dim=has.get("ffn_hidden_size"),
            head_dim=has.get("kv_channels"), max_seq_len=has.get("max_position_embeddings"),
            norm_eps=has.get("norm_epsilon", 1e-5), rope_theta=real("rotary_base", 10000),
            dmc=True, variant="nvidia",
            window=None if is_number(window, 0, 0) else window, tau=has.get("dmc_temp", 0.1),
            c=real("dmc_init_val", 5.0))
        return replace(config, control_pair=config.head_dim // 2 - 1)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def join(name, parts):
    """One tensor, from what the ranks of tensor parallelism have of it."""
    if len(parts) == 1 or name.endswith(("norm_weight", "layernorm.weight")):
        return parts[0]
    if name.endswith("linear_fc1.weight"):               # gate and up, on each rank
        return torch.cat([half for pair in zip(*(w.chunk(2) for w in parts), strict=True)
                          for half in pair])
    return torch.cat(parts, 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0)


def renamed(theirs, config):
    """Our weights by our names, made of theirs. Raises KeyError or RuntimeError where it cannot.

    A group of the fused matrix is its query heads, then its key head, then its value head.
    """
    D, G = config.head_dim, config.n_kv_head
    theirs, vocab = dict(theirs), config.vocab_size
    ours = {"embed_tokens.weight": theirs.pop("embedding.word_embeddings.weight")[:vocab],
            "lm_head.weight": theirs.pop("output_layer.weight")[:vocab],
            "norm.weight": theirs.pop("decoder.final_layernorm.weight")}
    for n in range(config.n_layer):
        layer, old = f"layers.{n}.", f"decoder.layers.{n}."
        fused = theirs.pop(old + "self_attention.linear_qkv.weight")
        groups = fused.view(G, config.n_head // G + 2, D, config.dim)
        gate, up = theirs.pop(old + "mlp.linear_fc1.weight").chunk(2)
        ours |= {
            layer + "self_attn.q_proj.weight": last_channel_first(groups[:, :-2]).flatten(0, 2),
            layer + "self_attn.k_proj.weight": last_channel_first(groups[:, -2]).flatten(0, 1),
            layer + "self_attn.v_proj.weight": groups[:, -1].flatten(0, 1),
            layer + "mlp.gate_proj.weight": gate, layer + "mlp.up_proj.weight": up} | {
            layer + name: theirs.pop(old + their_name) for name, their_name in {
                "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
                "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
                "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
                "mlp.down_proj.weight": "mlp.linear_fc2.weight"}.items()}
    return ours | theirs                # what is left over, check_weights refuses


def last_channel_first(rows):
    """The rows (..., D, dim) that make queries or keys, with channel D - 1 in the place of 0.

    It belongs to the last rotary pair, (a, b), as b. That pair changes places with pair 0 and is
    turned by a right angle, to (b, -a), which is exact.
    """
    return turned(rows, rows.size(-2) // 2 - 1, cos=0, sin=1)
