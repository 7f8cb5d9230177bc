"""Properties of nanodmc/config.py: which sizes are possible, and what a config.json may say."""

import math
from dataclasses import replace

import pytest
import torch

from dmc import Transformer
from nanodmc.config import checked_config, config_from_json, config_to_json, shape
from nanodmc.files import InputError
from test_dmc import config_of


@pytest.mark.parametrize("bad", [
    dict(n_kv_head=3), dict(dim=30, head_dim=None), dict(head_dim=7), dict(n_layer=0),
    dict(window=0), dict(tau=0.0), dict(head_dim=2), dict(window=1.5), dict(norm_eps="small"),
    dict(norm_eps=math.nan), dict(tau="0.1"), dict(c=None), dict(n_layer=True), dict(dim=16.0),
    dict(head_dim="4"), dict(rope_theta=10 ** 400), dict(rope_theta=math.nan)])
def test_impossible_configurations_are_refused(bad):
    with pytest.raises(InputError) as refused:
        checked_config(**{**vars(config_of()), **bad})
    assert "\n" not in str(refused.value)


def test_possible_configurations_stay_as_they_are():
    for changes in (dict(), dict(head_dim=4), dict(window=None), dict(window=1), dict(dmc=False)):
        config = config_of(**changes)
        assert checked_config(**vars(config)) == config
    values = {**vars(config_of()), "head_dim": None}
    assert checked_config(**values).head_dim == values["dim"] // values["n_head"]


SAYS_THE_SAME = {           # changes to a config.json that leave its meaning
    "nothing": {},
    "text": {"hidden_size": "16", "rms_norm_eps": "1e-5", "rope_theta": "1e4",
             "num_attention_heads": " 4 ", "head_dim": "8.0"},
    "whole floats": {"hidden_size": 16.0, "head_dim": 8.0, "num_hidden_layers": 2.0},
    "floats in whole": {"rope_theta": 10000},
    "switches as text": {"tie_word_embeddings": "false", "attention_bias": "False",
                         "mlp_bias": "0", "partial_rotary_factor": "1.0"},
    "nothing as null": {"rope_scaling": None, "rope_parameters": None, "attention_bias": None,
                        "tie_word_embeddings": None, "quantization_config": None,
                        "sliding_window": None, "partial_rotary_factor": None},
    "nothing as empty": {"rope_scaling": {}, "quantization_config": {}, "num_local_experts": 0},
    "entries of others": {"torch_dtype": "auto", "dtype": None, "foo": [1], "pretraining_tp": 2,
                          "_name_or_path": "x", "use_cache": False, "bos_token_id": [1, 2]},
    "another name of silu": {"hidden_act": "swish"},
    "a window that Llama does not know": {"sliding_window": 16},
    "a window as long as the context": {"model_type": "mistral", "sliding_window": "64"},
    "a window that may be left out": {"model_type": "mistral"},
    "the newer layout": {"rope_parameters": {"rope_type": "default", "rope_theta": "10000.0"}},
    "the newer name": {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2}},
    "both layouts": {"rope_scaling": {"rope_type": "default"},
                     "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
}


@pytest.mark.parametrize("case", SAYS_THE_SAME)
def test_a_config_json_is_taken_as_what_it_says(case):
    config = config_of((4, 2), dmc=False, window=12, c=5.0)
    read = config_from_json(config_to_json(config) | SAYS_THE_SAME[case])
    assert read == config
    kinds = [[type(x) for x in vars(one).values()] for one in (read, config)]
    assert kinds[0] == kinds[1] or case == "floats in whole"


def test_the_sections_of_a_config_json_may_hold_text():
    config = config_of((4, 2), rope_theta=500.0, tie_embeddings=True, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64})
    facts = config_to_json(config) | {"tie_word_embeddings": "True"}
    facts["dmc"] |= {"window": "12", "tau": "0.1", "c": str(config.c)}
    rope = {"type": "llama3", "factor": "8", "low_freq_factor": "1", "high_freq_factor": "4e0"}
    assert config_from_json(facts | {"rope_scaling": rope}) == config      # with its context
    facts["dmc"]["window"] = None
    assert config_from_json(facts | {"rope_scaling": rope}).window is None


def test_what_a_config_json_leaves_out_is_hugging_faces_default():
    facts = config_to_json(config_of((8, 8), dmc=False))
    for name in ("rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "rope_theta",
                 "rope_scaling", "tie_word_embeddings", "hidden_act"):
        del facts[name]
    config = config_from_json(facts)
    assert (config.norm_eps, config.max_seq_len, config.n_kv_head) == (1e-6, 2048, 8)
    with pytest.raises(InputError, match="sliding-window"):            # there, of 4096 tokens
        config_from_json(facts | {"model_type": "mistral"})
    config = config_from_json(facts | {"model_type": "mistral", "sliding_window": None,
                                       "num_attention_heads": 16})
    assert (config.max_seq_len, config.n_kv_head) == (131072, 8)


@pytest.mark.parametrize("bad", [
    {"hidden_size": "sixteen"}, {"hidden_size": 16.5}, {"hidden_size": True}, {"hidden_size": []},
    {"rms_norm_eps": "small"}, {"rms_norm_eps": {}}, {"rope_theta": "nan"}, {"head_dim": "inf"},
    {"sliding_window": "long", "model_type": "mistral"}, {"attention_bias": "true"},
    {"sliding_window": 63, "model_type": "mistral"}, {"dmc": True}, {"model_type": ["llama"]},
    {"dmc": {"method": "dmc", "window": "x", "tau": 1, "c": 1}}, {"rope_scaling": "linear"},
    {"rope_scaling": {"factor": 2.0}}, {"partial_rotary_factor": "half"}, {"hidden_act": None}])
def test_what_a_config_json_cannot_mean_is_refused(bad):
    with pytest.raises(InputError) as refused:
        config_from_json(config_to_json(config_of((4, 2), dmc=False)) | bad)
    assert "\n" not in str(refused.value)


ODD_VALUES = [None, True, False, -1, 0, 1.5, 32.0, 12.0, 1e300, 10 ** 8, 10 ** 12, 10 ** 30,
              -10 ** 30, math.nan, math.inf, "x", "1e-5", "", "\x1b[31m", [], [1], [[1]], {},
              {"a": 1}]
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
FIELDS = [(section, name) for section, names in (
    ("", [*config_to_json(config_of()), "sliding_window", "rope_parameters", "attention_bias",
          "partial_rotary_factor", "quantization_config", "num_local_experts"]),
    ("dmc", ["method", "window", "tau", "c"]), ("rope_scaling", [*LLAMA3, "rope_theta"]))
    for name in names]


@pytest.mark.parametrize("section, name", FIELDS)
def test_every_odd_value_works_or_is_refused_in_a_sentence(section, name):
    """With the file's name, and nothing that commands a terminal; what is taken runs."""
    facts = config_to_json(config_of((4, 2), n_layer=1)) | {"rope_scaling": LLAMA3}
    seen = [config_from_json(facts)]
    for value in ODD_VALUES:
        odd = facts | ({section: facts[section] | {name: value}} if section else {name: value})
        try:
            config = config_from_json(odd, "here/config.json")
        except InputError as error:
            assert str(error).startswith("here/config.json") and str(error).isprintable()
            assert len(str(error)) < 300
            continue
        assert config.max_seq_len * config.head_dim <= 2 ** 29
        if config in seen:
            continue
        seen.append(config)
        if max(config.vocab_size, config.n_layer, config.dim, config.ffn_dim) < 1000:
            model = Transformer(config)                # in tables and rings of a bounded size
            with torch.no_grad():
                model(torch.zeros(1, 3, dtype=torch.long), model.Cache(config, 1))


def test_positions_are_bounded_by_the_rotary_table_that_they_need():
    assert checked_config(**{**vars(config_of()), "max_seq_len": 2 ** 22}).max_seq_len == 2 ** 22
    for changes in (dict(max_seq_len=10 ** 8), dict(max_seq_len=2 ** 22, head_dim=256)):
        with pytest.raises(InputError, match="max_seq_len"):
            checked_config(**{**vars(config_of()), **changes})


def test_known_shapes():
    """The parameters that the models are named for."""
    for name, billions in (("llama2-7b", 6.74), ("llama2-13b", 13.02), ("llama2-70b", 68.98)):
        with torch.device("meta"):
            model = Transformer(shape(name))
        count = sum(p.numel() for p in model.parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.01)
        assert shape(name) == replace(shape(name, dmc=True), dmc=False)
