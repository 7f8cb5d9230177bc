"""Properties of nanodmc/parallel.py: several processes are together what one is alone."""

import json
import os
import shutil
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from conftest import (
    HERE,
    SHORT,
    TINY,
    PowerCut,
    curve,
    dies,
    interrupted,
    snapshot,
    summary,
    two_processes,
)
from dmc import Transformer, rotary_table
from nanodmc import checkpoint, parallel
from nanodmc.locks import Lock
from test_dmc import assert_close, config_of, groups, model_of, seeds

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny models

TWO_PROCESSES = """
import sys, torch, train
calls, step = iter(range(100)), train.train_step
def dying_step(*args):
    if next(calls) == 7:
        raise RuntimeError("power cut")
    return step(*args)
train.train_step = dying_step
torch.set_num_threads(1)
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_processes_train_like_one_and_resume_each_others_state(tmp_path, text):
    """One process into the retrofit; two, with FSDP2 over gloo, through solidify into the control;
    then one again."""
    arguments = ["--data", text, *TINY, *SHORT, "--save-every", "2", "--kv-heads", "2",
                 "--dim", "12", "--micro-batch", "1", "--distill", "0.5", "--choose-pair"]
    whole, out, script = tmp_path / "whole", tmp_path / "run", tmp_path / "two.py"
    assert train.main(["--out", str(whole), *arguments]) == 0
    with pytest.raises(PowerCut):
        interrupted(out, text, dies, arguments[2:], at=8)
    assert json.loads((out / "state.json").read_text())["tensors"] == "state-2-2"
    script.write_text(TWO_PROCESSES)
    two = two_processes(script, "--resume", "--out", out)
    state = json.loads((out / "state.json").read_text())
    assert "power cut" in two.stderr and state["tensors"] == "state-4-2", two.stderr
    assert train.main(["--out", str(out), "--resume"]) == 0
    for ours, theirs in zip(curve(out), curve(whole), strict=True):
        assert ours["phase"] == theirs["phase"] and ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["cr"] == pytest.approx(theirs["cr"], abs=1e-4)
        assert ours.get("kl") == pytest.approx(theirs.get("kl"), abs=1e-5)
    for ours, theirs in zip(summary(out)["dmc"], summary(whole)["dmc"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_every_rank_hears_that_another_process_writes(tmp_path, finished, text):
    out = shutil.copytree(finished, tmp_path / "run")
    before = snapshot(out)
    with Lock(out / ".lock", "the run"):
        two = two_processes(HERE / "train.py", "--resume", "--out", out)
    assert two.returncode and f"is being written by process {os.getpid()}" in two.stderr
    assert two.stderr.count("is being written by") == 2
    assert snapshot(out) == before


@given(seeds, groups)
@settings(max_examples=10)
def test_control_rows_feed_the_control_channels(seed, heads):
    """Writing to them changes channel 0 of every query and key head, and nothing else."""
    model = model_of(seed, heads)
    x = torch.randn(3, model.config.dim, dtype=torch.float64)
    attention = model.layers[1].self_attn
    projections = attention.q_proj, attention.k_proj
    before = [proj(x).unflatten(-1, (-1, 8)) for proj in projections]
    rows = parallel.control_rows(model)
    assert [len(r) for r in rows] == [*heads] * 2
    for r in rows:
        r.zero_()
    for was, proj in zip(before, projections, strict=True):
        now = proj(x).unflatten(-1, (-1, 8))
        assert (now[..., 0] == 0).all() and (was[..., 0] != 0).all()
        assert_close(now[..., 1:], was[..., 1:])


@given(st.sampled_from([2, 3, 6]), seeds)
@settings(max_examples=10)
def test_the_parts_of_a_model_add_up_to_it(tmp_path_factory, ranks, seed):
    """Each rank holds its heads and columns; their outputs sum to those of the whole layer."""
    torch.manual_seed(seed)
    whole = Transformer(config_of((12, 6), n_layer=1))
    folder = tmp_path_factory.mktemp("parts")
    checkpoint.save(whole, folder)
    layers = [whole.layers[0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "joined", lambda model: model)       # which needs the other ranks
        patch.setenv("WORLD_SIZE", str(ranks))
        for rank in range(ranks):
            patch.setenv("RANK", str(rank))
            part = parallel.load_part(folder)
            assert (part.config.n_head, part.config.n_kv_head) == (12 // ranks, 6 // ranks)
            layers.append(part.layers[0])
    x, angles = torch.randn(2, 7, whole.config.dim), rotary_table(whole.config, 7)
    attended = [layer.self_attn(x, *angles, None, False, None) for layer in layers]
    for total, *shares in ([layer.mlp(x) for layer in layers], [y for y, _ in attended]):
        assert_close(sum(shares), total, 1e-6)
    decided, *parts = (alpha for _, alpha in attended)
    assert torch.equal(torch.cat(parts, dim=1), decided)


def test_alone_there_is_nothing_to_add_up(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (parallel.this_rank(), parallel.rank_count()) == (0, 1)
    x = torch.tensor([1.0, 2.0])
    assert parallel.over_ranks(x) is x and x.tolist() == [1, 2] and parallel.local(x) is x


def test_no_graph_is_left_when_the_group_ends(monkeypatch):
    """Not even in the frames of the error that ended the process: NCCL would wait for it."""
    class Graph:
        pass

    def failing(graphs):
        graphs.append(graphs)                                    # only the collector frees it
        raise MemoryError

    left, graphs = [], [Graph()]
    graph = weakref.ref(graphs[0])
    try:
        failing(graphs)
    except MemoryError as error:
        monkeypatch.setattr(sys, "last_value", error, raising=False)
    del graphs
    monkeypatch.setattr(parallel.dist, "destroy_process_group", lambda: left.append(graph()))
    parallel.leave()
    assert left == [None]
