"""docs/library.md does what it says."""

import re
from pathlib import Path

import pytest

from nanodmc.checkpoint import load

PAGE = (Path(__file__).parent.parent / "docs/library.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"## ([^\n]*)\n[^#]*?```python\n(.*?)```", PAGE, re.DOTALL))


def test_all_blocks_are_found():
    assert len(BLOCKS) == PAGE.count("```python") == 5


@pytest.mark.parametrize("title", BLOCKS)
def test_the_page(title, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/1").symlink_to(finished)
    block = BLOCKS[title].replace("runs/1/cr4", "runs/1/cr3").replace("prompt, 40", "prompt, 6")
    exec(block, {})                     # the run of the tests has a CR of 3, and 16 positions
    shown = capsys.readouterr().out.splitlines()
    if title == "The cache by hand":
        assert len(shown) == 16
    elif title == "Memory with and without DMC":
        with_dmc, without = (int(re.search(r"([\d,]+) bytes", line)[1].replace(",", ""))
                             for line in shown)
        assert with_dmc <= without and "CR 1.00" in shown[1]
    elif title == "A policy of your own":
        assert shown == ["8"]
    elif title == "A training loop of your own":
        assert load(tmp_path / "mine").config.dmc
    else:
        assert shown[0] == "import os"
