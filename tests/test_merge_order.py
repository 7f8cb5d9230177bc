"""Properties of nanodmc/merge_order.py: what it accepts is cut as `tokenizers` cuts it."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle
from nanodmc.files import InputError
from nanodmc.merge_order import last_parts, merged
from nanodmc.tokenizer import Tokenizer

LETTERS = "abc"
TEXTS = ["".join(letters) for n in range(1, 8) for letters in itertools.product(LETTERS, repeat=n)]


def random_merges(seed):
    """Pairs of pieces at random, some twice and some pieces by two pairs, shuffled or not."""
    rng = np.random.default_rng(seed)
    pieces, pairs = list(LETTERS), []
    for _ in range(rng.integers(1, 9)):
        left, right = (pieces[i] for i in rng.integers(len(pieces), size=2))
        pairs.append([left, right])
        pieces.append(left + right)
    if rng.random() < 0.4:
        rng.shuffle(pairs)
    return [list(map(str, pair)) for pair in pairs]


def byte_level(merges):
    facts = json.loads(Tokenizer.bytes().files["tokenizer.json"])
    for left, right in merges:
        facts["model"]["vocab"].setdefault(left + right, 300 + len(facts["model"]["vocab"]))
    facts["model"]["merges"] = merges
    return facts


def sentencepiece(merges):
    """Over characters, with single bytes for those that are unknown."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *LETTERS,
              *(left + right for left, right in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
            "post_processor": None, "decoder": None,
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                      "vocab": vocab, "merges": merges}}


@pytest.mark.parametrize("form", [byte_level, sentencepiece])
def test_a_list_is_refused_or_cuts_every_text_as_the_tokenizers_library_does(form):
    """600 lists, and all texts of up to 7 letters. Both happens often."""
    theirs, refused = oracle("tokenizers").Tokenizer, 0
    for seed in range(300):
        facts = json.dumps(form(random_merges(seed)))
        try:
            ours = Tokenizer({"tokenizer.json": facts.encode()})
        except InputError as error:
            assert "in an order that training does not make" in str(error)
            refused += 1
            continue
        expected = [x.ids for x in theirs.from_str(facts).encode_batch_fast(
            TEXTS, add_special_tokens=False)]
        assert [ours.encode(text) for text in TEXTS] == expected, (seed, random_merges(seed))
    assert 30 < refused < 270


def test_a_list_that_merges_otherwise_is_refused():
    """ab comes first, so that abc is never a + bc; tiktoken would make it of ab + c."""
    wrong = [["a", "b"], ["b", "c"], ["a", "bc"]]
    with pytest.raises(InputError, match="in an order that training does not make"):
        Tokenizer({"tokenizer.json": json.dumps(byte_level(wrong)).encode()})
    Tokenizer({"tokenizer.json": json.dumps(byte_level(wrong[1:])).encode()})


@given(st.integers(0, 10_000))
def test_both_ways_to_the_last_parts_agree(seed):
    """By tiktoken, in groups of one size, and by the literal loop."""
    rng = np.random.default_rng(seed)
    pieces = {bytes(rng.choice(list(b"ab"), size=rng.integers(2, 7)).tolist()) for _ in range(20)}
    ranks = {piece: i for i, piece in enumerate([b"a", b"b", *sorted(pieces, key=hash)])}
    found = last_parts(ranks, pieces)
    for piece in pieces:
        shorter = {x: rank for x, rank in ranks.items() if len(x) < len(piece)}
        assert found[piece] == merged(piece, shorter)
