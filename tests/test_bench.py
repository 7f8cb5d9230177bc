"""Properties of nanodmc/bench.py: figure 5, throughput with and without compression."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import generate
from nanodmc import bench
from nanodmc.peers import PEERS
from test_dmc import config_of, qkv, seeds


@given(st.sampled_from([1.0, 1.5, 2.0, 4.0, 8.0]), seeds)
@settings(max_examples=10)
def test_forced_decisions_keep_what_they_should(cr, seed):
    """On average 1 / CR of the tokens, of each head its own part, and the cache shows it."""
    config = config_of((8, 4), n_layer=6)
    kept = bench.kept_parts(config, cr, seed)
    assert kept.mean().item() == pytest.approx(1 / cr, rel=1e-4) and kept.max() <= 1
    assert cr == 1 or kept.std() > 0.2 * kept.mean()
    torch.manual_seed(seed)
    cache = bench.forced(kept, "cpu")(config, 50)
    q, k, v, alpha, omega = (x.float() for x in qkv(seed, (8, 4), 64, B=50))
    cache.attend(3, q, k, v, alpha, omega)
    expected = 1 + 63 * kept[3]                                  # the first token always appends
    spread = (63 * kept[3] * (1 - kept[3]) / 50).sqrt()
    assert ((cache.lengths[3].double().mean(0) - expected).abs() < 5 * spread + 1e-3).all()


def test_bench_command(tmp_path, capsys, finished, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--bench", "--device", "cpu", "--tokens", "16", "--prompt-tokens", "40",
               "--cache-gb", "0.002", "--out", "folder.json"]
    assert generate.main([*command, "--cr", "3"]) == 0
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "folder.json").read_text())
    assert "Decisions are forced" in shown and "published, not measured" in shown
    assert "toy" in written["model"]
    assert max(map(len, shown.splitlines())) <= 80
    assert all(row["name"] in shown for row in written["rows"] if row["kind"] != "alone")
    first, *rest = [row for row in written["rows"] if row["kind"] != "peer"]
    largest = next(row for row in rest if row["name"] == "CR 3, largest batch")
    assert first["ratio"] == 1 and first["cr"] == pytest.approx(1)
    assert largest["cr"] == pytest.approx(3, rel=0.1)
    assert largest["batch"] > 1.5 * first["batch"]
    for row in written["rows"]:
        if row["kind"] != "peer":
            rate = 1e3 * row["batch"] / row["ms_per_step"]
            assert row["tokens_per_second"] == pytest.approx(rate)
            assert row["kv_bytes_logical"] < row["kv_bytes_allocated"] <= row["pool_bytes"]
            assert row["pool_bytes"] <= 0.002e9 and row["preempted"] == 0
            assert 0 < row["attention_share"] < 1 and 0 < row["share_of_memory_bound_limit"] < 1
    slots = first["batch"] * 2 * 4 * (40 + 11)       # layers, heads, tokens amid the last half
    assert first["kv_bytes_logical"] == slots * 2 * 32 * 4
    assert generate.main([*command, "--ckpt", str(finished / "cr2"), "--batch", "1", "2"]) == 2
    assert "16 positions" in capsys.readouterr().err


@pytest.mark.parametrize("name", [
    "CR 1, batch of CR 1", "CR 16, largest batch", "own decisions, batch of CR 1",
    "own decisions, largest batch", "own decisions, batch 4096", *PEERS])
def test_the_table_fits_a_terminal(name):
    """A line stays within 80 columns, whatever its name, from a toy to the fastest GPU."""
    big = {"name": name, "kind": "peer", "batch": 4096, "tokens_per_second": 123456.7,
           "ratio": 15.94, "cr": 16.04, "ms_per_step": 12345.6, "prefill_ms": 123456.7,
           "kv_bytes_logical": 141.2e9, "kv_bytes_allocated": 143.9e9, "peak_bytes": 143.9e9,
           "page_waste": 0.1234, "attention_share": 1.0, "share_of_memory_bound_limit": 1.0}
    small = {"name": name, "kind": "peer", "batch": 1, "tokens_per_second": 1.4, "ratio": 0.01,
             "cr": 1.0, "ms_per_step": 0.1, "kv_bytes_logical": 1.234e5}
    head = bench.bench_head()
    ends = [re.search(rf" {title}(?= |$)", head).end() for title in (
        "batch", "tokens/s", "ratio", "CR", "ms/step", "KV GB", "of limit")]
    assert len(head) <= 80
    for row in (big, small):
        line = bench.bench_line(row)
        assert len(line) <= 80 and "\n" not in line and line.startswith(name)
        for end in ends:                                         # below its title, and apart
            assert line[end - 1] != " " and line[end:end + 1] in (" ", "")
    assert bench.bench_line(big)[len(name):].split() == [
        "4096", "123,457", "15.94", "16.04", "12345.6", "141.200", "100%"]
    assert bench.bench_line(small).endswith("-")
