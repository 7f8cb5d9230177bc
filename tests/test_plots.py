"""Properties of nanodmc/plots.py: every picture is drawn, or it is said why not."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import train
from conftest import TINY, oracle, refusal
from nanodmc import plots

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny models


def is_picture(path):
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and len(content) > 10_000


def test_runs_are_drawn(finished, tmp_path, capsys):
    oracle("matplotlib")
    for name in ("one", "two"):
        shutil.copytree(finished, tmp_path / name)
    assert train.main(["--plot", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    picture = (tmp_path / "one/plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert not (tmp_path / "two/plot.png").exists()
    facts = json.loads((finished / "summary.json").read_text())
    expected = [[e["cr"], e["loss"] - facts["control"]] for e in facts["dmc"]]
    (lines,) = json.loads((tmp_path / "one/ratios.json").read_text()).values()
    assert [sorted(expected)] * 2 == list(lines.values())
    assert is_picture(tmp_path / "one/ratios.png")
    (tmp_path / "two/metrics.jsonl").write_text("")
    told = refusal(train.main, ["--plot", str(tmp_path / "two")], capsys, tmp_path)
    assert "no step with decisions" in told


def test_a_finished_run_is_drawn_as_loss_against_memory(finished, tmp_path):
    oracle("matplotlib")
    run = shutil.copytree(finished, tmp_path / "run")
    assert train.main(["--plot", str(run)]) == 0
    assert is_picture(run / "memory.png")
    (run / "memory.png").unlink()
    (run / "summary.json").unlink()                  # not finished yet
    assert train.main(["--plot", str(run)]) == 0
    assert (run / "plot.png").exists() and not (run / "memory.png").exists()


def test_a_benchmark_is_drawn_from_cr_1_with_all_peers_named(monkeypatch):
    oracle("matplotlib")
    rows = [{"name": name, "kind": kind, "batch": 3, "cr": cr, "tokens_per_second": speed}
            for name, kind, cr, speed in [
                ("CR 1, largest batch", "largest batch", 1.0, 10.0), ("one", "peer", 1.0, 9.0),
                ("other", "peer", 1.0, 9.0), ("CR 2, batch of CR 1", "batch of CR 1", 2.0, 15.0),
                ("CR 2, largest batch", "largest batch", 2.0, 20.0)]]
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, *_: figures.append(figure))
    assert plots.plot_bench(rows, "bench.png")
    (axes,) = figures[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines == {"largest batch": [10, 20], "batch of CR 1": [10, 15], "one, batch 3": [9, 9],
                     "other, batch 3": [9, 9]}
    assert len({line.get_linestyle() for line in axes.lines[2:]}) == 2


@pytest.mark.parametrize("name", ["run", "_run", "__", "$x_1$", "a\udcffb"])
def test_every_name_is_in_the_legend(name):
    oracle("matplotlib")
    axes = plots.new_figure(2, 2).subplots()
    axes.plot([0, 1], label=plots.as_label(name))
    (shown,) = axes.legend().get_texts()
    assert shown.get_text().strip() == plots.as_label(name).strip()
    axes.figure.draw_without_rendering()                         # a formula would be parsed


def test_loss_against_memory_needs_no_control(finished, tmp_path):
    """Without one, the loss itself is drawn, and no gain over the model given is claimed."""
    oracle("matplotlib")
    facts = json.loads((finished / "summary.json").read_text())
    for name in ("with", "without"):
        plots.plot_memory(facts, tmp_path / f"{name}.png")
        assert is_picture(tmp_path / f"{name}.png")
        facts.pop("control", None)
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


CURVE = {"index": 3, "step": 0, "phase": "retrofit", "loss": 1.0, "cr": 1.5, "target_cr": 1.0}


@pytest.mark.parametrize("name,change", [
    ("summary.json", {}), ("summary.json", None), ("summary.json", {"dmc": [{}]}),
    ("metrics.jsonl", CURVE | {"index": 99}), ("metrics.jsonl", CURVE | {"heads": [[1.0], []]}),
    ("metrics.jsonl", CURVE | {"heads": []}), ("metrics.jsonl", CURVE | {"heads": [[1.0] * 7]}),
    ("metrics.jsonl", CURVE | {"cr": None, "heads": [[1.0]]})])
def test_damage_is_told(name, change, finished, tmp_path, capsys):
    oracle("matplotlib")
    run = shutil.copytree(finished, tmp_path / "run")
    if name == "summary.json":
        (run / name).write_text(json.dumps(change and
                                           json.loads((run / name).read_text()) | change))
    else:
        with (run / name).open("a") as file:
            file.write(json.dumps(change) + "\n")
    assert train.main(["--plot", str(run)]) == 2
    assert f"{name} is damaged" in capsys.readouterr().err


def test_a_picture_is_whole_or_as_it_was(finished, tmp_path, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure")
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "plot.png").write_text("as it was")

    def full(self, file, **_):
        Path(file).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(figure.Figure, "savefig", full)
    told = refusal(train.main, ["--plot", str(run)], capsys, tmp_path)
    assert "plot.png cannot be written (No space left on device)" in told


def test_a_run_without_decisions_is_drawn_as_far_as_it_goes(tmp_path, text, capsys):
    oracle("matplotlib")
    arguments = ["--data", text, *TINY, "--heads", "2", "--kv-heads", "2", "--cr", "2",
                 "--keep", "2", "--variant", "gqa"]
    for seed in ("0", "1"):
        assert train.main(["--out", str(tmp_path / seed), *arguments, "--seed", seed]) == 0
    assert train.main(["--plot", str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    for name in ("plot", "memory", "ratios"):
        assert is_picture(tmp_path / f"0/{name}.png")
    assert "GQA" in (tmp_path / "0/ratios.json").read_text()


def test_a_plot_without_its_library(finished, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    told = refusal(train.main, ["--plot", str(finished)], capsys, tmp_path)
    assert "pip install matplotlib" in told
