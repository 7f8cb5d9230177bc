"""Properties of bench.py and throughput.py: figure 5, with and without compression."""

import json
import os
import re
import statistics
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dmc
import dmc_fast
import generate
from nanodmc import bench, cases, checkpoint, peers, throughput
from nanodmc.config import shape
from nanodmc.files import InputError
from nanodmc.peers import PEERS
from nanodmc.pool import PAGE
from test_dmc import config_of, qkv, seeds


@given(st.sampled_from([1.0, 1.5, 2.0, 4.0, 8.0]), seeds)
@settings(max_examples=10)
def test_forced_decisions_keep_what_they_should(cr, seed):
    """On average 1 / CR of the tokens, of each head its own part, and the cache shows it."""
    config = config_of((8, 4), n_layer=6)
    kept = cases.kept_parts(config, cr, seed)
    assert kept.mean().item() == pytest.approx(1 / cr, rel=1e-4) and kept.max() <= 1
    assert cr == 1 or kept.std() > 0.2 * kept.mean()
    torch.manual_seed(seed)
    cache = cases.forced(kept, "cpu")(config, 50)
    q, k, v, alpha, omega = (x.float() for x in qkv(seed, (8, 4), 64, B=50))
    cache.attend(3, q, k, v, alpha, omega)
    expected = 1 + 63 * kept[3]                                  # the first token always appends
    spread = (63 * kept[3] * (1 - kept[3]) / 50).sqrt()
    assert ((cache.lengths[3].double().mean(0) - expected).abs() < 5 * spread + 1e-3).all()


def test_a_model_that_decides_takes_no_cr():
    model = dmc.Transformer(config_of((8, 4)))
    with pytest.raises(InputError, match="--cr has no effect on a DMC model"):
        list(cases.bench_cases(model, [3.0], [0]))
    assert [case.name for case in cases.bench_cases(model, None, [0])][1:] == ["own decisions"]


def test_bench_command(tmp_path, capsys, finished, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--bench", "--device", "cpu", "--tokens", "16", "--prompt-tokens", "40",
               "--cache-gb", "0.004", "--out", "folder.json"]
    assert generate.main([*command, "--cr", "3"]) == 0
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "folder.json").read_text())
    assert "Decisions are forced" in shown and "published, not measured" in shown
    assert "toy" in written["model"]
    assert max(map(len, shown.splitlines())) <= 80
    assert all(row["name"] in shown for row in written["rows"] if row["kind"] != "alone")
    assert [row["name"] for row in written["rows"][1:len(PEERS) + 1]] == list(PEERS)
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
            assert row["pool_bytes"] <= 0.004e9 and row["preempted"] == 0
            assert 0 < row["attention_share"] < 1 and 0 < row["share_of_memory_bound_limit"] < 1
    slots = first["batch"] * 2 * 8 * (40 + 10)       # layers, heads, tokens amid what is timed
    assert first["kv_bytes_logical"] == slots * 2 * 32 * 4
    assert generate.main([*command, "--ckpt", str(finished / "cr2"), "--batch", "1", "2"]) == 2
    assert "16 positions" in capsys.readouterr().err
    assert generate.main(["--bench", "--ckpt", str(finished / "cr2")]) == 2
    assert "1 tokens and 16 more do not fit the model's 16 positions" in capsys.readouterr().err


def small(tmp_path, **changes):
    """The flags of a short benchmark, as `benchmark` takes them."""
    args = {"out": tmp_path / "bench.json", "prompt_tokens": [40], "tokens": 16, "cache_gb": 0.002,
            "ckpt": None, "model": None, "cr": [2.0], "batch": [2], **changes}
    return types.SimpleNamespace(**args)


def test_a_failure_costs_what_it_must_and_no_more(tmp_path, monkeypatch, capsys):
    """Each row is on disk as soon as it is there. A peer that fails costs its own row; a smaller
    batch is tried where memory runs out."""
    def no_memory(bench, batch):
        tried.append(batch)
        rows.append(len(json.loads((tmp_path / "bench.json").read_text())["rows"]))
        if batch > 3:
            raise RuntimeError("CUDA error: out of memory")
        return 0.5

    def broken(bench, batch):
        raise KeyError("rope")
    tried, rows = [], []
    monkeypatch.setattr(peers, "PEERS", found := {"broken": broken, "large": no_memory,
                                                  "absent": lambda *_: None})
    monkeypatch.setattr(bench, "PEERS", found)
    bench.benchmark(small(tmp_path, batch=[5]), "cpu")
    written, shown = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    by_name = {row["name"]: row for row in written["rows"]}
    assert tried == [5, 4, 3] and set(rows) == {2}            # CR 1, broken
    assert by_name["large"]["batch"] == 3 and by_name["large"]["tokens_per_second"] == 6
    assert "KeyError: 'rope'" in by_name["broken"]["error"] and "broken: failed, KeyError" in shown
    assert "absent: not installed." in shown and "CR 1, alone" in by_name
    assert max(map(len, shown.splitlines())) <= 80


@pytest.fixture
def h100(monkeypatch):
    """A Bench of Llama 2 7B as it would be on an H100, as far as planning goes."""
    monkeypatch.setattr(throughput, "copy_bandwidth", lambda device: 2.6e12)
    monkeypatch.setattr(throughput.Bench, "pages", lambda self, *_, **__: int(60e9) // self.page)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = dmc.Transformer(shape("llama2-7b", dmc=False))
    torch.set_default_dtype(usual)
    made = throughput.Bench(model, 2048, 2048, None, lambda i, n: [0] * n)
    made.on_gpu, made.device = True, torch.device("cpu")
    return made


def test_the_whole_takes_less_than_8_minutes_on_an_h100_by_count(h100):
    args = types.SimpleNamespace(cr=[2.0, 4.0, 8.0], batch=None)
    plan = bench.planned(h100, args)
    # CR 1's largest batch is that of CR 1
    assert [todo.name for todo in plan if todo.whole] == [plan[0].name, "CR 1, alone"]
    seconds = [bench.expected(h100, todo) for todo in plan]
    assert 4 * 60 < sum(seconds) < 8 * 60 and max(seconds) < 2 * 60
    sizes = [todo.batch for todo in plan if todo.kind == "largest batch"]
    assert 90 < sizes[-2] < 130 and 180 < sizes[-1] < 260        # CR 4 and 8
    assert plan[-len(PEERS) - 1].kind == "alone"                 # what peers break, comes last


def test_the_time_left_is_shown_where_there_is_some(h100, monkeypatch, capsys):
    clock = iter(range(0, 10 ** 6, 30))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))
    row = {"batch": 1, "tokens_per_second": 1.0, "ms_per_step": 1.0, "prefill_ms": 1.0}
    monkeypatch.setattr(throughput.Bench, "run", lambda *_: row)
    monkeypatch.setattr(bench, "peer_row", lambda name, *_: {**row, "name": name, "kind": "peer"})
    args = types.SimpleNamespace(cr=[2.0, 4.0, 8.0], batch=None)
    list(bench.measure(h100, args))
    left = [int(n) for n in re.findall("about ([0-9]+) min left", capsys.readouterr().out)]
    assert len(left) > 4 and left[-1] <= 3


def test_a_first_half_that_comes_with_the_prompt_leaves_the_same_state(one_thread, monkeypatch):
    model = checkpoint.random_model(shape("toy", dmc=False), dmc_fast, "cpu", torch.float32)
    made = throughput.Bench(model, 40, 200, 0.005, lambda i, n: [0] * n)
    case = list(cases.bench_cases(model, [8.0], [0]))[-1]
    batch = made.largest_batch(case, whole=False)
    assert made.skipped(case, whole=False) == 28 and made.skipped(case, whole=True) == 0
    whole, short = (made.run(case, batch, whole=whole) for whole in (True, False))
    assert short["cr"] == pytest.approx(whole["cr"], rel=0.03)
    assert short["kv_bytes_logical"] == pytest.approx(whole["kv_bytes_logical"], rel=0.03)
    monkeypatch.setattr(throughput, "over_ranks", lambda x, op: x + 8 * (op == "MAX"))
    assert made.skipped(case, whole=False) == 20         # all ranks as many as the slowest


@pytest.mark.parametrize("name, length, sequences", [
    ("toy", 4352, 20), ("toy", 40000, 4), ("llama2-7b", 48, 4)])
def test_the_pool_of_a_cpu_holds_a_few_sequences_of_any_model(name, length, sequences):
    size = shape(name)
    pool = 1e9 * bench.small_pool(size, length)
    sequence = 2 * size.n_layer * size.n_kv_head * size.head_dim * 4 * (length + PAGE)
    assert sequences * sequence <= pool < 1.5 * sequences * sequence


@pytest.mark.parametrize("positions, device, toy, lengths", [
    (4096, "cuda", True, (2048, 2048)), (2048, "cuda", False, (1024, 1024)),
    (8192, "cpu", True, (4096, 256)), (8192, "cpu", False, (1024, 256)),
    (512, "cpu", False, (256, 256)), (1100, "cpu", False, (844, 256))])
def test_what_is_not_asked_for_fits_the_positions(positions, device, toy, lengths):
    assert bench.usual_lengths(positions, device, toy) == lengths


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


@pytest.mark.skipif("DMC_RESULTS" not in os.environ, reason="takes DMC_RESULTS, and two minutes")
def test_the_engine_is_no_slower_than_its_peers(measured):
    """At CR 1 and the same batch, as --bench without a GPU has it. In turns, for a machine's speed
    drifts: what --bench measures last may profit."""
    config = shape("toy")
    prompt, count = bench.usual_lengths(config.max_seq_len, "cpu", toy=True)
    model = checkpoint.random_model(config, dmc_fast, "cpu", torch.float32)
    made = throughput.Bench(model, prompt, count, bench.small_pool(config, prompt + count),
                            lambda i, n: [i] * n)
    case = cases.uncompressed(model)
    batch, steps = made.largest_batch(case), {name: [] for name in ("engine", *PEERS)}
    for _ in range(7):
        steps["engine"].append(made.run(case, batch, whole=False)["ms_per_step"])
        for name in PEERS:
            steps[name].append(peers.peer_row(name, made, batch)["ms_per_step"])
    ours, *theirs = (statistics.median(times) for times in steps.values())
    measured.update(prompt=prompt, tokens=count, batch=batch, ms_per_step=steps)
    assert ours < 1.05 * min(theirs)
