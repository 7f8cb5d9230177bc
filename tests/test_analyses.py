"""Properties of nanodmc/analyses.py, against counts made head by head and token by token."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import generate
from conftest import oracle, refusal
from nanodmc import analyses
from nanodmc.tokenizer import Tokenizer
from test_dmc import model_of, seeds

sizes = st.lists(st.integers(2, 30), min_size=1, max_size=5)


def random_merges(seed, sizes, L=2, G=3):
    rng = np.random.default_rng(seed)
    pieces = [rng.random((L, G, T)) < rng.random((L, G, 1)) for T in sizes]
    for piece in pieces:
        piece[..., 0] = False                     # the first token always appends
    return pieces


def segments(merges, layer, head):
    """The segments of one head in each piece, as lists of positions."""
    for piece in merges:
        cut = []
        for t, merge in enumerate(piece[layer, head].tolist()):
            if merge:
                cut[-1].append(t)
            else:
                cut.append([t])
        yield cut


@given(seeds, sizes)
def test_ratios_are_tokens_per_slot(seed, sizes):
    merges = random_merges(seed, sizes)
    longest = 0
    for layer in range(2):
        counts = [[len(cut) for cut in segments(merges, layer, head)] for head in range(3)]
        for head in range(3):
            expected = sum(sizes) / sum(counts[head])
            assert analyses.head_ratios(merges)[layer, head] == pytest.approx(expected)
        longest += sum(max(column) for column in zip(*counts, strict=True))
    assert analyses.padded_ratio(merges) == pytest.approx(2 * sum(sizes) / longest)


@given(seeds, st.integers(1, 4), st.integers(4, 20))
def test_growth_is_the_ratio_of_the_first_tokens(seed, count, T):
    merges = random_merges(seed, [T] * count + [3])
    for n, ratio, error in analyses.growth(merges, [1, 2, T]):
        kept = []
        for piece in merges[:count]:
            slots = sum(not piece[layer, head, t] for layer in range(2) for head in range(3)
                        for t in range(n))
            kept.append(slots / (6 * n))
        mean = sum(kept) / count
        assert ratio == pytest.approx(1 / mean)
        if count == 1:
            assert error is None
        else:
            spread = math.sqrt(sum((x - mean) ** 2 for x in kept) / (count - 1) / count)
            assert error == pytest.approx(spread / mean ** 2)


@given(seeds, sizes, st.integers(1, 40))
def test_positions_are_averaged_in_ranges_that_cover_all(seed, sizes, bins):
    merges = random_merges(seed, sizes)
    ranges = analyses.by_position(merges, bins)
    assert [t for a, b, _ in ranges for t in range(a, b + 1)] == list(range(max(sizes)))
    for a, b, mean in ranges:
        values = [piece[layer, head, t] for piece in merges for layer in range(2)
                  for head in range(3) for t in range(a, min(b + 1, piece.shape[-1]))]
        assert mean == pytest.approx(sum(values) / len(values))


def test_words_begin_where_a_reader_says():
    tokens = [b"The", b" cac", b"he", b"_2", b".", b" \xc3", b"\xa9t\xc3\xa9", b"\n", b"", b"x"]
    starts = analyses.word_starts([list(range(len(tokens)))], lambda ids: tokens[ids[0]])
    assert starts[0].tolist() == [True, True, False, False, True, True, False, True, True, True]


@given(seeds, sizes)
def test_agreement_is_the_correlation_coefficient(seed, sizes):
    merges = random_merges(seed, [n + 3 for n in sizes])
    rng = np.random.default_rng(seed)
    starts = [rng.random(n + 3) < 0.4 for n in sizes]
    found = analyses.agreement(merges, starts)
    words = [w for piece in starts for w in piece[1:].tolist()]
    for layer in range(2):
        for head in range(3):
            appends = [not m for piece in merges for m in piece[layer, head, 1:].tolist()]
            if len(set(words)) == 1 or len(set(appends)) == 1:
                assert found[layer, head] == 0
            else:
                assert found[layer, head] == pytest.approx(np.corrcoef(appends, words)[0, 1])


def test_a_head_that_rebuilds_words_agrees_and_its_opposite_disagrees():
    starts = [np.array([True, False, True, True, False, False, True])]
    merges = [np.stack([~starts[0], np.r_[False, starts[0][1:]], np.zeros(7, bool)])[None]]
    assert analyses.agreement(merges, starts)[0] == pytest.approx([1, -1, 0])


def test_all_of_it_is_json_and_sees_every_token():
    model = model_of(3, (4, 2))
    documents = [torch.randint(0, 29, (n,)).tolist() for n in (150, 5, 1, 66)]
    facts = analyses.analyse(model, documents, Tokenizer.bytes().token_bytes)
    assert facts["pieces"] == 6 and facts["tokens"] == 221       # 64, 64, 22; 5; 64, 2; not the 1
    ratios = np.array(facts["figure 6"]["cr of layers and heads"])
    assert ratios.shape == (2, 2) and facts["cr"] == pytest.approx(1 / (1 / ratios).mean())
    assert 1 <= facts["padded_cr"] <= facts["cr"]
    assert [row[0] for row in facts["figure 8"]["length, cr, standard error"]] == [
        1, 2, 4, 8, 16, 32, 64]
    json.dumps(facts, allow_nan=False)


# ------------------------------------------------------------------------------------- --analyse

def test_analyses_are_written_and_drawn(finished, tmp_path, capsys, text):
    oracle("matplotlib")
    command = ["--ckpt", str(finished), "--analyse", str(tmp_path / "a"), "--tokens", "300"]
    assert generate.main(command) == 0
    facts = json.loads((tmp_path / "a/analyses.json").read_text())
    assert 16 < facts["tokens"] <= 300 and facts["text"] == f"the validation text of {finished}"
    assert f"CR {facts['cr']:.2f}" in capsys.readouterr().out
    assert (tmp_path / "a/analyses.png").read_bytes().startswith(b"\x89PNG")
    assert generate.main([*command, "--data", text]) == 0
    assert json.loads((tmp_path / "a/analyses.json").read_text())["text"] == "text.txt"


def test_analyses_need_no_matplotlib(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command = ["--ckpt", str(finished), "--analyse", str(tmp_path), "--tokens", "99"]
    assert generate.main(command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["analyses.json"]


def test_what_cannot_be_analysed_is_refused(finished, plain, tmp_path, capsys):
    told = lambda *flags: refusal(generate.main, list(flags), capsys, tmp_path)
    out = ["--analyse", str(tmp_path / "a")]
    assert "plain model" in told("--ckpt", str(finished / "control"), *out)
    alone = shutil.copytree(finished / "cr2", tmp_path / "alone")
    assert "add --data" in told("--ckpt", str(alone), *out)
    (tmp_path / "file").touch()
    assert "no folder" in told("--ckpt", str(finished), "--analyse", str(tmp_path / "file"))
    assert "no effect" in told("--ckpt", str(finished), *out, "--cr", "2")
