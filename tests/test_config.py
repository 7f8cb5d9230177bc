"""Properties of nanodmc/config.py: which sizes are possible, and which are known."""

from dataclasses import replace

import pytest
import torch

from dmc import Transformer
from nanodmc.config import checked_config, shape
from nanodmc.files import InputError
from test_dmc import config_of


@pytest.mark.parametrize("bad", [
    dict(n_kv_head=3), dict(dim=30, head_dim=None), dict(head_dim=7), dict(n_layer=0),
    dict(window=0), dict(tau=0.0), dict(head_dim=2)])
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


def test_known_shapes():
    """The parameters that the models are named for."""
    for name, billions in (("llama2-7b", 6.74), ("llama2-13b", 13.02), ("llama2-70b", 68.98)):
        with torch.device("meta"):
            model = Transformer(shape(name))
        count = sum(p.numel() for p in model.parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.01)
        assert shape(name) == replace(shape(name, dmc=True), dmc=False)
