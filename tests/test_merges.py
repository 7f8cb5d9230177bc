"""Properties of nanodmc/merges.py: what heads merged, in the terminal and as a page."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import generate
from conftest import HERE, refusal
from dmc import Cache
from nanodmc import checkpoint, merges
from nanodmc.parallel import control_rows
from nanodmc.tokenizer import Tokenizer
from test_dmc import model_of

PAGE = (HERE / "nanodmc/merges.html").read_text(encoding="utf-8")
PAGE_DATA = re.compile(r'(?<=<script type="application/json" id="data">).*?(?=</script>)',
                       re.DOTALL)
HOSTILE = "naïve </script><!-- & &amp; <b>'\"`${x}\\u003c DATA 🙂\r\n\n\t|\0\u2028end"


def slots_of_all_heads(model, ids, dtype):
    """(layer, head) -> the slots that a text takes, context by context, in fresh caches."""
    slots = 0
    for start in range(0, len(ids), 16):
        cache = Cache(model.config, 1, dtype=dtype)
        model(torch.tensor([ids[start:start + 16]]), cache)
        slots = slots + cache.lengths[:, 0]
    return slots


def test_segments_are_the_slots_and_spell_the_text(finished):
    model = checkpoint.load(finished / "cr3")
    with torch.no_grad():
        for row in control_rows(model):
            row.normal_(std=5.0)
    tokenizer = Tokenizer.bytes()
    text = "naïve “quotes” and 🙂"
    ids = tokenizer.encode(text)
    segments = merges.merged_segments(model, ids, 0, 0)
    assert sum(segments, []) == ids
    assert len(segments) == slots_of_all_heads(model, ids, torch.float32)[0, 0]
    shown, coloured = (merges.show_segments(segments, tokenizer, colour=colour)
                       for colour in (False, True))
    assert shown.replace("|", "") == text
    assert re.sub(r"\033\[[0-9;]*m", "", coloured) == text and "\033[" in coloured


def page_segments(page):
    """(layer, head) -> the texts of its segments, as the data of a page have them."""
    data = json.loads(PAGE_DATA.search(page)[0])
    L, G, T = data["layers"], data["heads"], len(data["tokens"])
    bits = np.frombuffer(base64.b64decode(data["merges"]), np.uint8).reshape(L, G, -1)
    segments = {}
    for layer, head in np.ndindex(L, G):
        cuts = [t for t in range(T) if not bits[layer, head, t // 8] >> (7 - t % 8) & 1] + [T]
        segments[layer, head] = ["".join(data["tokens"][i:j])
                                 for i, j in zip(cuts, cuts[1:], strict=False)]
    return segments


@given(st.text(min_size=1, max_size=12), st.integers(0, 5))
@example(HOSTILE, 0)
@settings(max_examples=8)
def test_merges_page_holds_the_segments_of_every_head(text, seed):
    """The page's data spell the text in as many segments as the cache has slots, the same as
    merged_segments, and stay data. The tokens are bytes, so it is the model's name that holds
    </script> in one piece."""
    model = model_of(seed, (4, 2), vocab_size=257, max_seq_len=16)
    tokenizer = Tokenizer.bytes()
    ids = tokenizer.encode(text)
    page = merges.merges_page(model, ids, tokenizer, HOSTILE)
    assert PAGE_DATA.sub("DATA", page) == PAGE
    assert json.loads(PAGE_DATA.search(page)[0])["model"] == HOSTILE
    slots = slots_of_all_heads(model, ids, torch.float64)
    for (layer, head), texts in page_segments(page).items():
        segments = merges.merged_segments(model, ids, layer, head)
        assert "".join(texts) == text and len(texts) == slots[layer, head]
        assert "|".join(texts) == merges.show_segments(segments, tokenizer, colour=False)


def test_merges_page_command(finished, messy_folder, capsys):
    arguments = ["--ckpt", str(finished / "cr2"), "--prompt", HOSTILE, "--show-merges"]
    for name in ("page.html", "folder/again.html"):
        assert generate.main([*arguments, name]) == 0 and name in capsys.readouterr().out
    page = Path("page.html").read_text(encoding="utf-8")
    assert page == Path("folder/again.html").read_text(encoding="utf-8")
    assert "".join(page_segments(page)[0, 0]) == HOSTILE
    assert json.loads(PAGE_DATA.search(page)[0])["positions"] == 16
    Path("occupied.html").mkdir()
    for name, words in (("occupied.html", "occupied.html is a folder"),
                        ("short/page.html", "short/page.html cannot be written")):
        assert words in refusal(generate.main, [*arguments, name], capsys, messy_folder)
    plain = ["--ckpt", str(finished / "control"), "--show-merges", "page.html"]
    assert "plain model" in refusal(generate.main, plain, capsys, messy_folder)


QUIET = [f"--{flag}" for flag in (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
    "disable-background-networking", "disable-component-update")]
ACT = """<script>
    document.body.append(text.cloneNode(true), $("facts").cloneNode(true));
    map.rows[1].cells[2].click();
    map.rows[1].cells[2].dispatchEvent(
        new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
    </script>"""


def test_merges_page_in_a_browser(tmp_path):
    """A browser without a window shows the segments of the head that the page's address, a click
    and an arrow key choose."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("there is no chromium or google-chrome to load the page with")
    model = model_of(1, (4, 2), vocab_size=257, max_seq_len=16)
    tokenizer = Tokenizer.bytes()
    text = HOSTILE.replace("\r", "").replace("\0", "")           # which printed HTML cannot hold
    page = merges.merges_page(model, tokenizer.encode(text), tokenizer, HOSTILE)
    (tmp_path / "page.html").write_text(page + ACT, encoding="utf-8")
    address = f"{(tmp_path / 'page.html').as_uri()}#1.0"
    command = [browser, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", address]
    dom = subprocess.run(command, capture_output=True, timeout=60).stdout.decode()
    shown = re.findall(r'<div id="text">(.*?)</div>', dom, re.DOTALL)
    facts = re.findall(r'<table id="facts">(.*?)</table>', dom, re.DOTALL)
    expected, tokens = page_segments(page), len(tokenizer.encode(text))
    heads = ((1, 1), (1, 0))                                     # after the acts, and before
    for spans, table, head in zip(shown, facts, heads, strict=True):
        texts = [html.unescape(re.sub("<.*?>", "", span))
                 for span in re.findall("<span.*?>(.*?)</span>", spans, re.DOTALL)]
        assert texts == expected[head] and len(texts) > 2
        assert (f"layer {head[0]}, head {head[1]}</td><td>{len(texts)}</td>"
                f"<td>{tokens}</td>") in table
