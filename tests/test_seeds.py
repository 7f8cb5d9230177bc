"""Comparisons of several seeds, put together."""

import contextlib
import json
import re
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

import generate
from conftest import refusal
from nanodmc import seeds
from test_cli import Terminal

losses = st.floats(0.5, 4, allow_nan=False)


def row(argument, name, method, loss, cr=1.0, model="control"):
    return {"name": f"{argument} {name}", "argument": argument, "method": method,
            "model": f"{argument}/{model}", "nats_per_byte": loss, "cr": cr,
            "cache_bytes": 100 / cr}


def comparison(path, seed, plain, dmc, **more):
    path.write_text(json.dumps({"rows": [
        row(f"runs/{seed}/a", "pretrained", "plain", plain + 1, model="pretrained"),
        row(f"runs/{seed}/a", "control", "plain", plain),
        row(f"runs/{seed}/b", "DMC 2x", "DMC", dmc, 2.0 + seed / 10)], **more}))
    return str(path)


@given(st.lists(st.tuples(losses, losses), min_size=1, max_size=4))
def test_distances_are_within_each_seed(tmp_path_factory, seen):
    folder = tmp_path_factory.mktemp("seeds")
    paths = [comparison(folder / f"{i}.json", i, *pair) for i, pair in enumerate(seen)]
    rows = {row["name"]: row for row in seeds.combined(paths)}
    assert list(rows) == ["a pretrained", "a control", "b DMC 2x"]
    assert rows["a control"]["above"] == [0] * len(seen)
    assert rows["b DMC 2x"]["above"] == [dmc - plain for plain, dmc in seen]
    assert rows["b DMC 2x"]["mean_above"] == pytest.approx(fmean(d - p for p, d in seen))
    assert rows["b DMC 2x"]["base"] == "a control"


def test_the_table_and_the_files(tmp_path, capsys):
    paths = [comparison(tmp_path / f"{i}.json", i, 1.5, 1.6 + i / 10) for i in range(3)]
    assert generate.main(["--compare", *paths, "--out", str(tmp_path / "all.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80
    assert shown[3].split() == ["b", "DMC", "2x", "2.00-2.20", "1.7000", "+0.2000",
                                "+0.1000", "to", "+0.3000"]
    result = json.loads((tmp_path / "all.json").read_text())
    assert result["rows"][2]["nats_per_byte"] == pytest.approx([1.6, 1.7, 1.8])
    assert result["files"] == paths and "commit" in result
    assert "| b DMC 2x | 2.00-2.20 | 1.7000 | +0.2000 |" in (tmp_path / "all.md").read_text()


def test_a_file_counts_once_however_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    comparison(tmp_path / "0.json", 0, 1.5, 1.6)
    assert generate.main(["--compare", "0.json", "./0.json", str(tmp_path / "0.json")]) == 0
    assert "Means over 1 files" in capsys.readouterr().out


def test_no_row_commands_a_terminal(tmp_path):
    path, screen = tmp_path / "0.json", Terminal()
    comparison(path, 0, 1.5, 1.6)
    path.write_text(path.read_text().replace("control", "\\u001b[A\\r control"))
    with contextlib.redirect_stdout(screen):
        assert generate.main(["--compare", str(path)]) == 0
    assert "\u241b[A\u240d control" in screen.getvalue()
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", screen.getvalue())


def test_what_cannot_be_put_together(tmp_path, capsys):
    good = comparison(tmp_path / "good.json", 0, 1.5, 1.6)
    other = tmp_path / "other.json"
    refuse = lambda *words: refusal(
        generate.main, ["--compare", good, str(other), *words], capsys, tmp_path)
    other.write_text('{"rows": [1]}')
    assert "holds no rows of --compare" in refuse()
    other.write_text(json.dumps({"rows": [{**row("runs/1/a", "x", "DMC", 1.0), "cr": "two"}]}))
    assert "holds no rows of --compare" in refuse()
    other.write_text(json.dumps({"rows": [row("runs/1/a", "x", "DMC", 1.0)]}))
    assert "do not compare the same" in refuse()
    other.write_text(json.dumps({"rows": [row(f"runs/{i}/a", "x", "DMC", 1.0) for i in (0, 1)]}))
    assert "has two rows called a x" in refuse()
    other.unlink()
    assert "compare results with results" in refuse()
    comparison(other, 1, 1.5, 1.6)
    assert "--cr has no effect with --compare FILE.json" in refuse("--cr", "2")
    assert "--ckpt has no effect" in refuse("--ckpt", "runs/1")
    assert "is there already" in refuse("--out", str(other))
