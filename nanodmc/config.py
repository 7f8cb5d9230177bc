"""The Config of a model: sizes that are checked, known shapes, and Hugging Face's config.json."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import dmc
from nanodmc.files import InputError, is_number, read_json
from nanodmc.variants import VARIANTS, VariantConfig

MODEL_TYPE = "dmc_llama"        # not "llama", so that software without DMC refuses the weights
AUTO_MAP = {"AutoConfig": "modeling_dmc.DMCLlamaConfig",        # where transformers finds them
            "AutoModelForCausalLM": "modeling_dmc.DMCLlamaForCausalLM"}
IN_CONFIG_JSON = {
    "vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "dim": "hidden_size", "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings", "head_dim": "head_dim", "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "rope_scaling": "rope_scaling",
    "tie_embeddings": "tie_word_embeddings"}
MOST = {                        # what is larger is damage: no model comes near
    "vocab_size": 2 ** 24, "n_layer": 2 ** 12, "n_head": 2 ** 12, "n_kv_head": 2 ** 12,
    "dim": 2 ** 20, "ffn_dim": 2 ** 24, "max_seq_len": 2 ** 22, "head_dim": 2 ** 14,
    "window": 2 ** 16}
WHOLE = ("vocab_size", "n_layer", "n_head", "n_kv_head", "dim", "ffn_dim", "max_seq_len")
MOST_ANGLES = 2 ** 29           # positions x head_dim: the rotary table takes 2 GB then
LARGEST = 1e15                  # of the other numbers, far inside what a float32 holds
DEFAULTS = {                    # Hugging Face's, for what a config.json may leave out
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8,
                "sliding_window": 4096}}
UNSUPPORTED = {
    "attention_bias": "attention bias", "mlp_bias": "bias in its MLP",
    "quantization_config": "quantized weights", "num_local_experts": "a mixture of experts"}
ROPE_NUMBERS = {                # what each type of rotary embedding needs
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}

LLAMA2 = dict(vocab_size=32000, max_seq_len=4096, norm_eps=1e-5)
SHAPES = {
    "llama2-7b": dict(n_layer=32, n_head=32, n_kv_head=32, dim=4096, ffn_dim=11008, **LLAMA2),
    "llama2-13b": dict(n_layer=40, n_head=40, n_kv_head=40, dim=5120, ffn_dim=13824, **LLAMA2),
    "llama2-70b": dict(n_layer=80, n_head=64, n_kv_head=8, dim=8192, ffn_dim=28672, **LLAMA2)}
TOY = dict(vocab_size=256, n_layer=2, n_head=8, n_kv_head=8, dim=128, ffn_dim=256, head_dim=32,
           max_seq_len=8192)


# ----------------------------------------------------------------------------------------- sizes

def checked_config(**values):
    """The Config with these values. Raises InputError where one is impossible, or two disagree."""
    head_dim = values.get("head_dim")             # with a number here, Config computes nothing
    kind = VariantConfig if "variant" in values else dmc.Config
    config = kind(**{**values, "head_dim": 0 if head_dim is None else head_dim})
    for name in WHOLE:
        if not is_number(n := getattr(config, name), 1, MOST[name], int):
            raise InputError(
                f"{name} is {shown(n)}; give a whole number from 1 to {MOST[name]:,}.")
    if config.n_head % config.n_kv_head:
        raise InputError(
            f"{config.n_head} query heads cannot share {config.n_kv_head} key-value heads evenly; "
            f"choose a number of key-value heads that divides {config.n_head}.")
    if head_dim is None:
        if config.dim % config.n_head:
            raise InputError(f"dim {config.dim} is no multiple of {config.n_head} heads; "
                             "choose one, or give head_dim.")
        config = replace(config, head_dim=config.dim // config.n_head)
    if not is_number(n := config.head_dim, 4, MOST["head_dim"], int) or n % 2:
        raise InputError(f"head_dim is {shown(n)}; rotary embedding needs an even number, "
                         f"of at least 4 here, and at most {MOST['head_dim']:,}.")
    if config.max_seq_len * config.head_dim > MOST_ANGLES:
        raise InputError(f"{config.max_seq_len:,} positions of heads of {config.head_dim:,} need a "
                         "rotary table beyond 2 GB; lower max_seq_len "
                         "(max_position_embeddings).")
    if config.window is not None and not is_number(config.window, 1, MOST["window"], int):
        raise InputError(f"window is {shown(config.window)}; give a whole number from 1 to "
                         f"{MOST['window']:,}, or None for the whole segment.")
    for name in ("norm_eps", "tau", "c"):
        if not is_number(x := getattr(config, name), -LARGEST, LARGEST):
            raise InputError(f"{name} is {shown(x)}; give a number.")
    if config.norm_eps < 0:
        raise InputError(f"norm_eps is {config.norm_eps}; give a number of at least 0.")
    if not config.tau > 0:
        raise InputError(f"tau is {config.tau}; a temperature is above 0.")
    check_rope(config)
    check_control_pair(config)
    check_variant(config)
    return config


def dtype_name(weight):
    """The name of a tensor's dtype, as config.json spells it."""
    return str(weight.dtype).removeprefix("torch.")


def shown(value):
    """A value from a file, for a message: short, and without characters that command terminals."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def named(value):
    """The same, but a plain text without quotes."""
    plain = isinstance(value, str) and value.isprintable() and len(value) <= 80
    return value if plain else shown(value)


def check_rope(config):
    """Raises InputError for a type of rotary embedding, or a number of it, that is not known."""
    scaling = config.rope_scaling or {"rope_type": "default"}
    if (kind := scaling.get("rope_type")) not in ROPE_NUMBERS:
        raise InputError(f"the rotary embedding is of type {named(kind)}; "
                         f"only {', '.join(ROPE_NUMBERS)} work here.")
    numbers = {name: scaling.get(name) for name in ROPE_NUMBERS[kind]}
    for name, value in {"rope_theta": config.rope_theta, **numbers}.items():
        if not is_number(value, 0, LARGEST) or value == 0:
            raise InputError(f"{name} of the rotary embedding is {shown(value)}; "
                             f"give a number above 0, and at most {LARGEST:g}.")


def check_control_pair(config):
    """Raises InputError for a pair that no head has, or one of a plain Llama that moved."""
    pairs = config.head_dim // 2
    if not is_number(n := config.control_pair, 0, pairs - 1, int):
        raise InputError(f"control_pair is {shown(n)}; give a whole number from 0 to {pairs - 1}.")
    if n and not config.dmc:
        raise InputError(f"control_pair is {n}, which a plain Llama cannot have; give 0.")


def check_variant(config):
    """Raises InputError for a variant that nobody knows, or that lacks a number."""
    variant = getattr(config, "variant", "dmc")
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise InputError(f"there is no variant {named(variant)}; {', '.join(VARIANTS)} are known "
                         "here.")
    if variant == "fmp" and not is_number(n := config.every, 2, MOST["window"], int):
        raise InputError(f"fixed pooling every {shown(n)} tokens is impossible; give a whole "
                         "number of at least 2.")


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
        method = {"method": "dmc", "window": config.window, "tau": config.tau, "c": config.c,
                  "control_pair": config.control_pair}
        if isinstance(config, VariantConfig):
            method |= {"variant": config.variant, "every": config.every}
        facts = {"auto_map": AUTO_MAP, "tokenizer_class": "PreTrainedTokenizerFast",
                 "dmc": {**method, **facts}}
    return {**kind, "hidden_act": "silu", **values, **facts}


def as_number(value):
    """The number that a text such as "256" or "1e-5" is; any other value as it is."""
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value)
    return value


def as_whole(value):
    """The whole number that "256", 256.0 or "256.0" is; any other value as it is."""
    value = as_number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_flag(value):
    """Whether a switch is on, also where it is a text such as "false"."""
    if isinstance(value, str):
        return value.strip().lower() not in ("false", "no", "off", "none", "null", "0", "")
    return bool(value)


def config_from_json(facts, source="config.json"):
    """The Config that a config.json holds. Raises InputError for damage and for other models."""
    try:
        refuse_other_models(facts, source)
        facts = DEFAULTS.get(facts["model_type"], DEFAULTS["llama"]) | facts
        values = {ours: facts[theirs] for ours, theirs in IN_CONFIG_JSON.items()
                  if facts.get(theirs) is not None}
        values.setdefault("n_kv_head", values.get("n_head"))
        values |= {name: as_whole(values[name]) for name in (*WHOLE, "head_dim") if name in values}
        values |= rope_values(facts, values.get("max_seq_len"))
        values["norm_eps"] = as_number(values.get("norm_eps", 1e-6))
        values["tie_embeddings"] = as_flag(values.get("tie_embeddings"))
        check_window(facts, values.get("max_seq_len"), source)
        section = facts.get("dmc") or {}
        if section and section.get("method") != "dmc":
            raise InputError(
                f"{source} names the method {named(section.get('method'))}; "
                "only dmc is known here.")
        if section:
            values |= {"window": as_whole(section["window"]), "tau": as_number(section["tau"]),
                       "c": as_number(section["c"]),
                       "control_pair": as_whole(section.get("control_pair", 0))}
            if (variant := section.get("variant")) is not None:
                values |= {"variant": variant, "every": as_whole(section.get("every"))}
        try:
            return checked_config(dmc=bool(section), **values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{source} is no usable configuration "
                         f"({type(error).__name__}: {shown(str(error))}); restore it.") from None


def rope_values(facts, max_seq_len):
    """rope_theta and rope_scaling of the Config, from a config.json in the newer or older layout.

    Where it has both, Hugging Face takes the older one; of two names of the type, the newer.
    """
    rope = dict(facts.get("rope_scaling") or facts.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", facts.get("rope_theta"))
    kind = rope.pop("rope_type", rope.pop("type", None if rope else "default"))
    rope = {name: as_number(value) for name, value in rope.items()}
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", max_seq_len)
    return {"rope_theta": 10000.0 if theta is None else as_number(theta),
            "rope_scaling": {"rope_type": kind, **rope} if kind != "default" else None}


def check_window(facts, max_seq_len, source):
    """Raises InputError where attention slides; a window as long as the context does not."""
    window = as_whole(facts.get("sliding_window"))
    slides = facts["model_type"] == "mistral" and window is not None    # Llama knows no such entry
    if slides and window < max_seq_len:
        raise InputError(f"{source} describes a model with sliding-window attention, "
                         "which is not supported here; choose another one.")


def refuse_other_models(facts, source):
    """Raises InputError, by name, for what this Llama does not have."""
    if (kind := facts.get("model_type")) not in ("llama", "mistral", MODEL_TYPE):
        raise InputError(f"{source} describes a model of type {named(kind)}; "
                         "only Llama-family ones (llama, mistral) work here.")
    asked = {feature for key, feature in UNSUPPORTED.items() if as_flag(facts.get(key))}
    if as_number(facts.get("partial_rotary_factor") or 1) != 1:
        asked.add("partial rotary embedding")
    if asked:
        raise InputError(f"{source} describes a model with {min(asked)}, "
                         "which is not supported here; choose another one.")
    if (act := facts.get("hidden_act", "silu")) not in ("silu", "swish"):       # two names for it
        raise InputError(f"{source} names the activation {named(act)}; "
                         "only silu is supported here.")


def read_config(path):
    """The Config of the checkpoint in a folder, from its config.json. Raises InputError."""
    return config_from_json(read_json(Path(path) / "config.json"), Path(path) / "config.json")
