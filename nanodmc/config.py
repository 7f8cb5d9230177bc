"""The Config of a model: sizes that are checked, known shapes, and Hugging Face's config.json."""

import math
from dataclasses import replace
from pathlib import Path

import dmc
from nanodmc.files import InputError, read_json

MODEL_TYPE = "dmc_llama"        # not "llama", so that software without DMC refuses the weights
IN_CONFIG_JSON = {
    "vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "dim": "hidden_size", "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings", "head_dim": "head_dim", "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "rope_scaling": "rope_scaling",
    "tie_embeddings": "tie_word_embeddings"}
UNSUPPORTED = {
    "attention_bias": "attention bias", "mlp_bias": "bias in its MLP",
    "sliding_window": "sliding-window attention", "quantization_config": "quantized weights",
    "num_local_experts": "a mixture of experts"}
ROPE_NUMBERS = {                # what each type of rotary embedding needs
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}

LLAMA2 = dict(vocab_size=32000, max_seq_len=4096, norm_eps=1e-5)
SHAPES = {
    "llama2-7b": dict(n_layer=32, n_head=32, n_kv_head=32, dim=4096, ffn_dim=11008, **LLAMA2),
    "llama2-13b": dict(n_layer=40, n_head=40, n_kv_head=40, dim=5120, ffn_dim=13824, **LLAMA2),
    "llama2-70b": dict(n_layer=80, n_head=64, n_kv_head=8, dim=8192, ffn_dim=28672, **LLAMA2)}
TOY = dict(vocab_size=512, n_layer=2, n_head=4, n_kv_head=4, dim=128, ffn_dim=384, max_seq_len=512)


# ----------------------------------------------------------------------------------------- sizes

def checked_config(**values):
    """The Config with these values. Raises InputError where one is impossible, or two disagree."""
    head_dim = values.get("head_dim")             # with a number here, Config computes nothing
    config = dmc.Config(**{**values, "head_dim": 0 if head_dim is None else head_dim})
    for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "dim", "ffn_dim", "max_seq_len"):
        n = getattr(config, name)
        if not isinstance(n, int) or n < 1:
            raise InputError(f"{name} is {n!r}; give a whole number of at least 1.")
    if config.n_head % config.n_kv_head:
        raise InputError(
            f"{config.n_head} query heads cannot share {config.n_kv_head} key-value heads evenly; "
            f"choose a number of key-value heads that divides {config.n_head}.")
    if head_dim is None:
        if config.dim % config.n_head:
            raise InputError(f"dim {config.dim} is no multiple of {config.n_head} heads; "
                             "choose one, or give head_dim.")
        config = replace(config, head_dim=config.dim // config.n_head)
    if config.head_dim < 4 or config.head_dim % 2:
        raise InputError(f"head_dim is {config.head_dim}; rotary embedding needs an even number, "
                         "of at least 4 here.")
    if config.window is not None and config.window < 1:
        raise InputError(
            f"window is {config.window}; give at least 1, or None for the whole segment.")
    if not config.tau > 0:
        raise InputError(f"tau is {config.tau}; a temperature is above 0.")
    check_rope(config)
    return config


def check_rope(config):
    scaling = config.rope_scaling or {"rope_type": "default"}
    if (kind := scaling.get("rope_type")) not in ROPE_NUMBERS:
        raise InputError(f"the rotary embedding is of type {kind}; "
                         f"only {', '.join(ROPE_NUMBERS)} work here.")
    numbers = {name: scaling.get(name) for name in ROPE_NUMBERS[kind]}
    for name, value in {"rope_theta": config.rope_theta, **numbers}.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{name} of the rotary embedding is {value}; give a number above 0.")


def shape(name, **changes):
    """The Config of "llama2-7b", ... or "toy", plain unless changed. Raises InputError."""
    shapes = {**SHAPES, "toy": TOY}
    if name not in shapes:
        raise InputError(f"there is no shape {name}; random weights come as {', '.join(shapes)}.")
    return checked_config(**{**shapes[name], "dmc": False, **changes})


# ------------------------------------------------------------------------------------ config.json

def config_to_json(config, **facts):
    """The Config as Hugging Face's config.json, with facts: for a DMC model in section "dmc"."""
    values = {theirs: getattr(config, ours) for ours, theirs in IN_CONFIG_JSON.items()}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if config.dmc:
        kind = {"architectures": ["DMCLlamaForCausalLM"], "model_type": MODEL_TYPE}
        method = {"method": "dmc", "window": config.window, "tau": config.tau, "c": config.c}
        facts = {"dmc": {**method, **facts}}
    return {**kind, "hidden_act": "silu", **values, **facts}


def config_from_json(facts, source="config.json"):
    """The Config that a config.json holds. Raises InputError for damage and for other models."""
    try:
        refuse_other_models(facts, source)
        values = {ours: facts[theirs] for ours, theirs in IN_CONFIG_JSON.items()
                  if facts.get(theirs) is not None}
        values.setdefault("n_kv_head", values.get("n_head"))
        values.setdefault("norm_eps", 1e-6)                 # the default of Hugging Face's Llama
        # the newer layout, or the older one; in that, an older name of the type
        rope = dict(facts.get("rope_parameters") or facts.get("rope_scaling") or {})
        values["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
        kind = rope.pop("type", rope.pop("rope_type", None if rope else "default"))
        values["rope_scaling"] = {"rope_type": kind, **rope} if kind != "default" else None
        section = facts.get("dmc") or {}
        if section and section.get("method") != "dmc":
            raise InputError(
                f"{source} names the method {section.get('method')}; only dmc is known here.")
        values |= {name: section[name] for name in ("window", "tau", "c") if section}
        return checked_config(dmc=bool(section), **values)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{source} is no usable configuration ({type(error).__name__}: {error}); "
                         "restore it.") from None


def refuse_other_models(facts, source):
    """Raises InputError, by name, for what this Llama does not have."""
    if (kind := facts.get("model_type")) not in ("llama", "mistral", MODEL_TYPE):
        raise InputError(f"{source} describes a model of type {kind}; "
                         "only Llama-family ones (llama, mistral) work here.")
    asked = {feature for key, feature in UNSUPPORTED.items() if facts.get(key)}
    if (facts.get("partial_rotary_factor") or 1) != 1:
        asked.add("partial rotary embedding")
    if asked:
        raise InputError(f"{source} describes a model with {min(asked)}, "
                         "which is not supported here; choose another one.")
    if (act := facts.get("hidden_act", "silu")) != "silu":
        raise InputError(f"{source} names the activation {act}; only silu is supported here.")


def read_config(path):
    """The Config of the checkpoint in a folder, from its config.json. Raises InputError."""
    return config_from_json(read_json(Path(path) / "config.json"), Path(path) / "config.json")
