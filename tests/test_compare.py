"""Properties of nanodmc/compare.py and of what it is made of: text, contenders, tables."""

import json
import math
import os
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dmc
import generate
from conftest import HERE, TEXTS, edit_json, refusal
from dmc import Cache
from nanodmc import baselines, compare, plots, policies
from nanodmc.checkpoint import load
from nanodmc.comparison import Progress, table
from nanodmc.contenders import Case, Subject
from nanodmc.files import InputError
from nanodmc.heldout import Piece, chosen, pieces
from nanodmc.history import history
from nanodmc.locks import only_writer
from nanodmc.records import write_sealed
from nanodmc.text import load_data
from nanodmc.tokenizer import Tokenizer
from test_dmc import both, model_of, seeds

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny models
BYTES = Tokenizer.bytes()


# ------------------------------------------------------------------------------------ the text

@given(st.lists(TEXTS, min_size=1, max_size=5), st.integers(1, 9), st.booleans())
@settings(max_examples=60)
def test_pieces_predict_every_token_of_the_text_once(texts, context, starts):
    """Their bytes are the text's, but for a first token that nothing stands before."""
    tokenizer = BYTES if starts else SimpleNamespace(
        eos=None, prefix=[], encode=BYTES.encode, token_bytes=BYTES.token_bytes)
    cut = pieces(texts, tokenizer, context)
    for number, text in enumerate(texts):
        mine = [piece for piece in cut if piece.document == number]
        predicted = text.encode() if starts else text.encode()[1:]
        assert b"".join(BYTES.token_bytes(piece.ids[1:]) for piece in mine) == predicted
        assert sum(piece.bytes for piece in mine) == len(predicted)
        assert all(1 < len(piece.ids) <= context + 1 for piece in mine)
        assert all(a.ids[-1] == b.ids[0] for a, b in zip(mine, mine[1:], strict=False))
        assert not mine or mine[0].ids[0] == (256 if starts else text.encode()[0])


def test_a_blank_that_the_tokenizer_adds_is_no_text():
    tokenizer = SimpleNamespace(eos=1, prefix=[1], encode=lambda text, special: [9, 10, 11],
                                token_bytes=lambda ids: b"".join({9: b" a", 10: b"b", 11: b"c",
                                                                  1: b""}[i] for i in ids))
    assert [piece.bytes for piece in pieces(["abc"], tokenizer, 2)] == [2, 1]


@given(st.lists(st.text("ab\xe9\U0001f642", max_size=40), max_size=8), st.integers(16, 100),
       st.integers(4, 30))
@settings(max_examples=100)
def test_a_text_is_shortened_by_its_documents(texts, tokens, context):
    size = sum(len(text.encode()) for text in texts)
    if not size:
        with pytest.raises(InputError, match="nothing in it"):
            chosen(texts, BYTES, tokens, context)
        return
    used = chosen(texts, BYTES, tokens, context)
    filled = [text for text in texts if text]
    assert all(a.startswith(b) for a, b in zip(filled, used, strict=False))
    total = sum(len(text.encode()) for text in used)
    assert total <= tokens and (size > tokens or used == filled)
    assert total > min(size, tokens) - 4 * len(filled)        # whole characters


def test_of_many_documents_a_beginning_each_is_used():
    used = chosen(["x" * 1000] * 50, BYTES, 1600, 64)
    assert [len(text) for text in used] == [100] * 16
    assert [len(text) for text in chosen(["x" * 1000] * 50, BYTES, 160, 64)] == [40] * 4
    assert [len(text) for text in chosen(["y", "x" * 1000], BYTES, 160, 64)] == [1, 159]


def test_a_run_validates_on_the_text_that_training_left_out(finished, text):
    subject = Subject(str(finished))
    _, held_out, key = load_data(subject.settings, None)
    assert key == subject.key
    whole = bytes(held_out[0:len(held_out)].tolist()[:-1]).decode()
    assert "".join(subject.texts()) == whole and whole in Path(text).read_text()


# ---------------------------------------------------------------------------------- the figures

def random_pieces(seed, context=14):
    rng = np.random.default_rng(seed)
    sizes = [*rng.integers(1, context + 1, 4), context, context]
    return [Piece(i // 2, rng.integers(0, 29, n + 1).tolist(), int(n)) for i, n in enumerate(sizes)]


def case_of(model, method, cr=None):
    return Case("x", "x", method, None, model.config, cr)


@both
@given(seeds, st.sampled_from([(4, 4), (4, 2)]))
@settings(max_examples=8)
def test_the_plain_model_costs_what_the_training_form_says(ops, seed, heads):
    model, cut = model_of(seed, heads, ops=ops, dmc=False), random_pieces(seed)
    case = case_of(model, "plain")
    row = compare.row_of(case, cut, compare.measure(model, case, cut), 8)
    losses = []
    for piece in cut:
        ids = torch.tensor(piece.ids)[None]
        losses.append(F.cross_entropy(model(ids[:, :-1])[0][0], ids[0, 1:], reduction="sum"))
    count = sum(len(piece.ids) - 1 for piece in cut)
    assert row["nats_per_token"] == pytest.approx(sum(losses).item() / count, rel=1e-12)
    assert row["nats_per_byte"] == pytest.approx(row["nats_per_token"])       # a token is a byte
    assert row["cr"] == row["padded_cr"] == 1 and row["tokens"] == count
    assert row["cache_bytes"] * 6 == count * 2 * heads[1] * 2 * 8 * 8
    assert (row["allocated_bytes"] is None) == (not hasattr(model.new_cache(1), "bytes"))


@both
@given(seeds)
@settings(max_examples=6)
def test_dmc_is_measured_through_its_cache(ops, seed):
    """Token by token, one piece at a time, with Algorithm 1."""
    model, cut = model_of(seed, (4, 2), ops=ops), random_pieces(seed)
    row = compare.row_of(case_of(model, "DMC"), cut,
                         compare.measure(model, case_of(model, "DMC"), cut), 8)
    loss, slots, padded = 0, 0, 0
    for piece in cut:
        cache = Cache(model.config, 1, dtype=torch.float64)
        for x, y in zip(piece.ids, piece.ids[1:], strict=False):
            loss -= model(torch.tensor([[x]]), cache)[0][0, 0].log_softmax(-1)[y].item()
        slots += cache.lengths.sum().item()
        padded += 2 * cache.lengths.amax(2).sum().item()
    count = row["tokens"]
    assert row["nats_per_token"] == pytest.approx(loss / count)
    assert row["cr"] == pytest.approx(count * 4 / slots) and row["cr"] > 1
    assert row["padded_cr"] == pytest.approx(count * 4 / padded)
    assert row["cache_bytes"] == pytest.approx(slots * 2 * 8 * 8 / len(cut))


@pytest.mark.parametrize("method", ["h2o", "averaging"])
def test_every_piece_has_a_budget_of_its_own(method):
    model, cut = model_of(1, (4, 2), dmc=False), random_pieces(5)
    case = case_of(model, method, 3.0)
    measured = compare.measure(model, case, cut)
    for i, piece in enumerate(cut):
        tokens = len(piece.ids) - 1
        make = (policies.policy_cache("h2o", max(1, tokens // 3)) if method == "h2o"
                else baselines.pooling_cache(Cache, 3))
        cache = make(model.config, 1, dtype=torch.float64)
        ids = torch.tensor(piece.ids)[None]
        logits = model(ids[:, :-1], cache)[0][0]
        loss = F.cross_entropy(logits, ids[0, 1:], reduction="sum")
        assert measured.nats[i].item() == pytest.approx(loss.item(), rel=1e-9)
        assert measured.slots[i] == cache.lengths.sum()


def test_standard_errors_by_hand():
    nats, ones = torch.tensor([1.0, 2.0, 4.0, 9.0]).double(), torch.ones(4).double()
    ratio, error = compare.ratio_and_error(nats, 5 * ones)
    assert ratio == 0.8
    assert error == pytest.approx(statistics.stdev([0.2, 0.4, 0.8, 1.8]) / 2)
    sizes = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    ratio, error = compare.ratio_and_error(nats, sizes)      # 16 / 10; residuals -.6 -1.2 -.8 2.6
    assert ratio == 1.6
    assert error == pytest.approx(math.sqrt(4 / 3 * (0.36 + 1.44 + 0.64 + 6.76)) / 10)
    assert compare.ratio_and_error(nats[:1], ones[:1]) == (1.0, None)


def test_errors_are_over_documents_or_over_the_pieces_of_one():
    cut = [Piece(number, [0, 0], 1) for number in (0, 0, 3, 0, 2)]
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert compare.by_unit(x, cut).tolist() == [11, 16, 4]
    assert compare.by_unit(x, [Piece(2, [0, 0], 1)] * 5) is x


@pytest.mark.parametrize("cr", [2.0, 3.0])
def test_differences_to_the_plain_model_are_paired(cr):
    """The same text cost both models much or little: the error of a difference leaves that out."""
    model, cut = model_of(2, (4, 2), dmc=False), random_pieces(9)
    plain, other = case_of(model, "plain"), case_of(model, "window", cr)
    base = compare.measure(model, plain, cut)
    measured = compare.measure(model, other, cut)
    row = compare.row_of(other, cut, measured, 8, base.nats)
    own = compare.row_of(plain, cut, base, 8, base.nats)
    assert own["above_plain"] == own["above_plain_stderr"] == 0
    assert row["above_plain"] == pytest.approx(row["nats_per_token"] - own["nats_per_token"])
    tokens = torch.tensor([len(piece.ids) - 1.0 for piece in cut]).double()
    difference = (measured.nats - base.nats).view(3, 2).sum(1)
    assert row["above_plain_stderr"] == pytest.approx(
        compare.ratio_and_error(difference, tokens.view(3, 2).sum(1))[1])


# --------------------------------------------------------------------------------- the command

NAMES = ["pretrained", "control", "DMC 2x", "DMC 3x", "every 2 averaged", "h2o 1.5x", "h2o 2x",
         "tova 1.5x", "tova 2x"]
FLAGS = ["--cr", "1.5,2", "--policy", "h2o,tova", "--tokens", "100"]


def test_a_run_side_by_side(finished, tmp_path, capsys):
    out = tmp_path / "new/rows.json"
    assert generate.main(["--compare", str(finished), *FLAGS, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if "/" not in line or "+-" in line) <= 80
    saved = json.loads(out.read_text())
    assert [row["name"] for row in saved["rows"]] == NAMES
    promised = {"name", "cr", "nats_per_token", "nats_per_byte", "stderr", "cache_bytes",
                "tokens_per_second"}
    for row in saved["rows"]:
        assert promised < row.keys() and math.isfinite(row["nats_per_token"])
        assert row["name"] in shown and f"{row['nats_per_token']:.4f}" in shown
        assert row["tokens"] == saved["text"]["tokens"] == saved["text"]["bytes"] == 100
    ratios = {row["name"]: row["cr"] for row in saved["rows"]}
    assert ratios["control"] == 1 and ratios["every 2 averaged"] == pytest.approx(2, abs=0.1)
    assert 1.5 <= ratios["h2o 1.5x"] == ratios["tova 1.5x"] < 1.7
    assert saved["versions"]["torch"] == torch.__version__ and saved["text"]["context"] == 16
    told = json.loads(json.dumps(history(finished, Subject(str(finished)).settings)))
    assert saved["training"] == {str(finished): told}
    page = out.with_suffix(".md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(NAMES) and len({line.count("|") for line in lines}) == 1
    assert out.with_suffix(".png").exists() == (plots.new_figure(1, 1) is not None)
    said = refusal(generate.main, ["--compare", str(finished), *FLAGS, "--out", str(out)], capsys,
                   tmp_path)
    assert "is there already" in said


def test_figures_of_a_run_are_those_of_its_model(finished):
    """Of the whole command, from the files: the control in fp64, by the training form."""
    done = compare.Comparison([str(finished)], ["h2o"], [2.0], None, 90, None)
    done.run(dmc, "cpu")
    model = load(finished / "control", dtype=torch.float64)
    losses = []
    for text in done.texts:
        ids = [256, *text.encode()]
        for at in range(0, len(ids) - 1, 16):
            x = torch.tensor([ids[at:at + 17]])
            losses.append(F.cross_entropy(model(x[:, :-1])[0][0], x[0, 1:], reduction="sum"))
    rows = {row["name"]: row for row in done.rows}
    assert rows["control"]["nats_per_token"] == pytest.approx(sum(losses).item() / 90, abs=1e-5)
    assert rows["pretrained"]["above_plain"] is None and rows["h2o 2x"]["above_plain"] != 0


def test_the_divergence_is_that_from_the_model_given(finished):
    """KL(given || model), token by token from the probabilities, in fp64 by the training form."""
    done = compare.Comparison([str(finished)], ["h2o"], [2.0], None, 90, None)
    done.run(dmc, "cpu")
    rows = {row["name"]: row for row in done.rows}
    model_of = lambda name: load(finished / name, dtype=torch.float64)
    given, names = model_of("pretrained"), {"control": "control", "cr2": "DMC 2x"}
    for folder, name in names.items():
        model, divergence = model_of(folder), 0
        for text in done.texts:
            ids = [256, *text.encode()]
            for at in range(0, len(ids) - 1, 16):
                x = torch.tensor([ids[at:at + 17]])[:, :-1]
                p, q = (m(x)[0][0].softmax(-1) for m in (given, model))
                divergence += (p * (p / q).log()).sum().item()
        assert rows[name]["kl_from_given"] == pytest.approx(divergence / 90, abs=1e-5)
        assert rows[name]["kl_from_given"] > 0
    assert rows["pretrained"]["kl_from_given"] == 0
    assert rows["h2o 2x"]["kl_from_given"] > 0


def test_a_run_on_top_of_gqa_starts_from_what_is_plain_to_it(finished, tmp_path):
    """The model given and the control have the same heads, and so the same CR."""
    run = shutil.copytree(finished, tmp_path / "run")
    edit_json(run / "pretrained/config.json", lambda config: config.update(kv_heads_before_gqa=2))
    done = compare.Comparison([str(run)], [], [], None, 90, None)
    done.run(dmc, "cpu")
    rows = {row["name"]: row for row in done.rows}
    assert rows["pretrained"]["method"] == "plain" and rows["DMC 2x"]["kl_from_given"] is not None
    assert rows["pretrained"]["cr"] == rows["control"]["cr"] == 1
    alone = compare.Comparison([str(run / "pretrained")], [], [], [str(HERE / "README.md")], 90,
                               None)
    alone.run(dmc, "cpu")
    assert [row["cr"] for row in alone.rows] == [2]


def test_nobody_else_writes_a_comparison_meanwhile(finished, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    command = ["--compare", str(finished), "--policy", "", "--tokens", "90"]
    with only_writer(tmp_path / "out/rows.json"):
        said = refusal(generate.main, [*command, "--out", str(tmp_path / "out/rows.json")], capsys,
                       tmp_path)
    assert f"is being written by process {os.getpid()}" in said


@pytest.mark.parametrize("name,text", [(b"caf\xe9.txt", '{"text": "3 times 4"}'),
                                       (b"half.jsonl", '{"text": "a\\ud83d 3 times 4"}')])
def test_texts_and_names_that_utf8_lacks(plain, tmp_path, name, text):
    path, out = tmp_path / os.fsdecode(name), tmp_path / "rows.json"
    path.write_text(text)
    assert generate.main(["--compare", str(plain), "--policy", "", "--data", str(path),
                          "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert all(math.isfinite(row["nats_per_byte"]) for row in rows["rows"])
    assert out.with_suffix(".md").is_file()


def test_a_model_is_known_by_its_place_however_it_is_written(finished, monkeypatch):
    """A run beside the model that it started from: it is measured once, and compared with."""
    monkeypatch.chdir(finished)
    run, model, found = str(finished), "cr2/../pretrained", []
    for names in [run], [run, model], [model, run]:
        done = compare.Comparison(names, [], [], None, 90, None)
        done.run(dmc, "cpu")
        assert len(done.rows) == 4
        row = next(row for row in done.rows if "DMC 2x" in row["name"])
        found.append([row[x] for x in ("nats_per_token", "above_plain", "kl_from_given")])
    assert found[0] == found[1] == found[2] and None not in found[0]


def test_ctrl_c_keeps_what_is_done(finished, tmp_path, capsys, monkeypatch):
    measure, calls = compare.measure, iter(range(100))

    def interrupted(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(compare, "measure", interrupted)
    out = tmp_path / "rows.json"
    assert generate.main(["--compare", str(finished), *FLAGS, "--out", str(out)]) == 130
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 of 9 rows are done." in shown and "DMC 2x" in shown and str(out) in shown
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == NAMES[:3]
    assert "DMC 2x" in out.with_suffix(".md").read_text()


def test_models_by_themselves(finished, plain, tmp_path, capsys):
    """A plain one with its policies, a DMC one, and one whose tokenizer is another."""
    text = tmp_path / "text.txt"
    text.write_text("3 times 4 is 12.\n\f\nfive times é is unknown.\n")
    other = shutil.copytree(plain, tmp_path / "other")
    facts = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps({**facts, "version": "2.0"}))
    flags = ["--data", str(text), "--policy", "sinks", "--cr", "2", "--ops", "reference"]
    names = [str(plain), str(finished / "cr2")]
    assert generate.main(["--compare", *names, *flags]) == 0
    shown = capsys.readouterr().out
    assert "tokenizers differ" not in shown and "2 documents" in shown
    assert f"{plain} sinks 2x\n" in shown and f"{plain} every 2 averaged\n" in shown
    assert shown.count(str(finished)) == 1
    assert generate.main(["--compare", str(plain), str(other), *flags]) == 0
    assert "tokenizers differ" in " ".join(capsys.readouterr().out.split())


def test_without_matplotlib_there_is_no_plot(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, "new_figure", lambda *size: None)
    out = tmp_path / "rows.json"
    assert generate.main(["--compare", str(finished), *FLAGS, "--out", str(out)]) == 0
    assert "is the plot" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "rows.md"]


REFUSED = {
    "an unknown policy": ("RUN --policy lru", "no policy lru; choose from h2o"),
    "a budget below 1 slot": ("RUN --cr 17", "a budget below 1 slot of sequences of 16 tokens"),
    "DMC weights": ("RUN/cr2 --data shortish --policy tova", "holds the weights of a DMC model"),
    "no text": ("RUN/cr2", "needs a held-out text; add --data"),
    "no such text": ("RUN --data nowhere", "nowhere cannot be read"),
    "an empty text": ("RUN --data results", "nothing in it"),
    "binary text": ("RUN --data binary", "not UTF-8"),
    "no such model": ("nowhere", "nowhere is no folder"),
    "a broken model": ("truncated --data shortish", "truncated"),
    "a ratio below 1": ("RUN --cr 0.5", "out of range"),
    "a ratio that is none": ("RUN --cr 2,x", "invalid float value"),
    "nothing between commas": ("RUN --cr 2,,4", "invalid float value"),
    "a place for a table": ("RUN --out short", "let it end with .json"),
    "a place below a file": ("RUN --out short/x.json", "choose another --out"),
    "another mode's flag": ("RUN --ckpt x", "--ckpt has no effect with --compare"),
    "a flag of sampling": ("RUN --seed 1", "--seed has no effect with --compare")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, messy_folder, finished, capsys):
    flags, says = REFUSED[name]
    arguments = flags.replace("RUN", str(finished)).split()
    assert says in refusal(generate.main, ["--compare", *arguments], capsys, messy_folder)


def test_policy_without_a_comparison_is_refused(finished, capsys, tmp_path):
    said = refusal(generate.main, ["--ckpt", str(finished), "--policy", "h2o"], capsys, tmp_path)
    assert "--policy has no effect without --compare" in said


def test_runs_on_different_texts_need_one(finished, tmp_path, capsys):
    other = shutil.copytree(finished, tmp_path / "other")
    facts = json.loads((other / "run.json").read_text())
    del facts["checksum"]
    write_sealed(other / "run.json", {**facts, "text": "another"})
    said = refusal(generate.main, ["--compare", str(finished), str(other)], capsys, tmp_path)
    assert "different texts" in said
    said = refusal(generate.main, ["--compare", str(other)], capsys, tmp_path)
    assert "not the one" in said
    shutil.rmtree(other)
    other.mkdir()
    (other / "run.json").write_text(json.dumps(facts))
    assert "has no model yet" in refusal(generate.main, ["--compare", str(other)], capsys, tmp_path)
    (other / "run.json").write_text("{}")
    assert "one by one" in refusal(generate.main, ["--compare", str(other)], capsys, tmp_path)


@torch.no_grad()
def test_smollm2_costs_what_transformers_says(smollm2, smollm2_pair, english):
    ours, theirs = smollm2_pair
    cut = pieces([english[:900], english[5000:5300]], Tokenizer.from_folder(smollm2), 100)
    case = case_of(ours, "plain")
    row = compare.row_of(case, cut, compare.measure(ours, case, cut), 4)
    losses = []
    for piece in cut:
        ids = torch.tensor(piece.ids)[None]
        losses.append(F.cross_entropy(theirs(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum"))
    assert row["nats_per_token"] == pytest.approx(sum(losses).item() / row["tokens"], rel=1e-4)
    assert sum(piece.bytes for piece in cut) == len((english[:900] + english[5000:5300]).encode())


# ----------------------------------------------------------------------------------- what is shown

def test_the_table_fits_a_terminal_whatever_the_figures():
    row = {"name": "a/very/long/path/to/a/model, h2o 2x", "cr": 123.4, "padded_cr": 123.4,
           "nats_per_token": 12.3456, "stderr": None, "nats_per_byte": 12.3456,
           "cache_bytes": 999.9e9, "tokens_per_second": 999_999.0}
    rows = [row, {**row, "name": "x", "stderr": 12.3456, "cache_bytes": 999_949}]
    text = {"stderr_over": "pieces of one document", "same_tokenizer": False}
    lines = table(rows, text).splitlines()
    assert max(map(len, lines)) <= 80 and lines[1] == row["name"]
    assert len(lines[2].split()) == 8 and "999.9 GB" in lines[2] and "999.9 kB" in lines[3]


@pytest.mark.parametrize("same", [True, False])
def test_the_plot_has_a_line_for_each_method(same, tmp_path, monkeypatch):
    """From the plain model's whole cache on, by memory; in nats that can be compared."""
    figure = plots.new_figure(4, 3)
    if figure is None:
        pytest.skip("matplotlib is not installed")
    monkeypatch.setattr(plots, "new_figure", lambda *size: figure)
    row = lambda method, cache, loss: {
        "name": method, "argument": "run", "method": method, "cache_bytes": cache * 1000,
        "nats_per_token": loss, "nats_per_byte": loss / 4, "above_plain": loss - 2,
        "above_plain_stderr": 0.5, "kl_from_given": None, "kl_from_given_stderr": None}
    rows = [row("plain", 8, 2.0), row("tova", 2, 3.0), row("tova", 4, 2.5), row("DMC", 3, 2.2)]
    assert plots.plot_comparison(rows, {"same_tokenizer": same, "context": 9, "name": "a text"},
                                 tmp_path / "plot.png")
    axes, factor = figure.axes[0], 1 if same else 0.25
    lines = {bars.get_label(): np.array(bars[0].get_xydata()) for bars in axes.containers}
    expected = {"plain": [(8, 2)], "tova": [(8, 2), (4, 2.5), (2, 3)], "DMC": [(8, 2), (3, 2.2)]}
    for name, points in expected.items():
        assert np.allclose(lines.pop(name), np.array(points) * [1, factor])
    assert not lines and ("token" in axes.get_ylabel()) == same
    bar = axes.containers[1][2][0].get_segments()[1][:, 1]
    assert bar[1] - bar[0] == pytest.approx(2 * 0.5 * factor)


def test_progress_knows_that_policies_are_slower():
    now = [0.0]
    progress = Progress(4, 100, clock=lambda: now[0])
    one = [Case(name, "", method, None, None) for name, method in
           (("a", "plain"), ("b", "DMC"), ("c", "h2o"), ("d", "tova"))]
    progress.begin(one[0], one[1:])
    assert progress.seconds_left() is None
    now[0] = 5.0
    progress.add(50)                             # a second per 10 tokens; policies: twice that
    assert progress.seconds_left() == pytest.approx(5 + 10 + 20 + 20)
    now[0] = 10.0
    progress.add(50)
    progress.end()
    progress.begin(one[2], one[3:])
    now[0] = 40.0
    progress.add(50)
    assert progress.seconds_left() == pytest.approx(30 + 60)
    assert str(progress) == "1/4 rows  c 50%  1:30 left"
