"""Properties of nanodmc/tables.py: what a run shows fits a terminal, at any size of run."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodmc.phases import plan
from nanodmc.settings import PRESETS, Settings
from nanodmc.tables import LOG_HEAD, Pace, heat_map, log_line, table
from nanodmc.terminal import duration

# without subnormal numbers, which train.main switches off for the whole process
floats = partial(st.floats, allow_subnormal=False)


@given(st.sampled_from(sorted(PRESETS)), st.integers(0, 5), floats(0, 1), floats(1, 64),
       floats(1e-4, 20), floats(10, 9e5), floats(0.01, 700), floats(0, 3e7))
def test_a_log_line_fits_a_terminal(preset, phase, share, cr, loss, speed, gigabytes, left):
    """Of the largest runs too, and its columns stay below their names."""
    phase = plan(Settings(**PRESETS[preset]))[phase]
    step = int(share * (phase.steps - 1))
    entry = {"step": step, "target_cr": phase.target(step), "cr": cr if phase.cr else None,
             "lr": phase.learning_rate(step, 10), "mfu": share, "peak_gb": gigabytes,
             "tokens_per_second": round(speed)}
    for seconds in (left, None):
        line = log_line(phase, entry, loss, seconds)
        assert len(line) == len(LOG_HEAD) <= 79
        words = line.removeprefix(phase.title).split()
        assert words[0] == f"{step + 1}/{phase.steps}" and words[1] == f"{loss:.4f}"
        assert words[-1] == duration(seconds) and f" {round(speed):,} " in line


def test_durations():
    assert [duration(x) for x in (None, 0.0, 59.9, 245, 3600, 14700, 2 * 86400 + 3600 * 5)] == [
        "-", "0:00", "0:59", "4:05", "1h00m", "4h05m", "2d05h"]


def test_the_pace_follows_the_latest_steps():
    """A machine that becomes three times slower, or a slow start, is the pace 20 steps later."""
    pace = Pace()
    pace.add(False, 60.0)
    assert pace.left({True: 5, False: 5}) is None                 # the first step is slow
    pace.add(False, 2.0)
    assert pace.left({True: 0, False: 2}) == 62
    for _ in range(1000):
        pace.add(False, 1.0)
    assert pace.per_step(False) == 1 and pace.per_step(True) == 1.7
    for _ in range(20):
        pace.add(False, 3.0)
    assert pace.per_step(False) == 3
    pace.add(True, 4.0)
    assert pace.left({True: 10, False: 1}) == 43


def ratios(layers, heads, start=1.0):
    """CRs from start on, 0.1 more for each head."""
    return [[start + 0.1 * (i * heads + h) for h in range(heads)] for i in range(layers)]


@pytest.mark.parametrize("layers,heads", [(1, 1), (3, 4), (12, 8), (30, 3), (32, 32), (40, 40),
                                          (80, 8), (13, 5)])
def test_a_heat_map_of_any_size_fits_a_terminal_and_has_every_head(layers, heads):
    plain = heat_map([[1.0] * heads] * layers)
    assert max(map(len, plain.splitlines())) <= 80
    for layer in {0, 1, layers // 2, layers - 1} & set(range(layers)):
        for head in range(heads):
            changed = [[16.0 if (i, h) == (layer, head) else 1.0 for h in range(heads)]
                       for i in range(layers)]
            shown = heat_map(changed)
            assert shown != plain and "█" in "".join(shown.splitlines()[2:])
            assert max(map(len, shown.splitlines())) <= 80


def test_a_heat_map_of_few_heads_has_their_figures():
    shown = heat_map(ratios(30, 3))
    assert all(f"{cr:.1f}" in shown for row in ratios(30, 3) for cr in row)
    layers = [int(word) for line in shown.splitlines()[3:] for word in line.split()
              if word.isdecimal()]
    assert sorted(layers) == list(range(30))


def test_a_heat_map_of_the_laptop_stays_as_it_was():
    assert heat_map([[1.0, 2.0], [4.0, 16.5]]).splitlines() == [
        "", "CR of each layer and head (shades: 1, 2, 4, 8, 16 and more)",
        "layer    head 0   head 1",
        "    0       1.0 ░░   2.0",
        "    1  ▒▒   4.0 ██  16.5"]


ENTRY = {"target": 2.0, "cr": 2.05, "loss": 1.5, "heads": [[2.05]], "pooling": 3.0}
FACTS = {"unit": "byte", "pretrained": 1.75, "dmc": [ENTRY]}


def test_the_table_says_how_far_each_model_is_from_its_control():
    rows = [line.split() for line in table({**FACTS, "control": 1.25}).splitlines()[2:]]
    assert rows[0][-3:] == ["1.00", "1.7500", "+0.5000"]
    assert rows[2] == ["DMC", "2x", "2.05", "1.5000", "+0.2500"]
    assert rows[3][-3:] == ["2.00", "3.0000", "+1.7500"]
    assert [row[-1] for row in rows] == ["+0.5000", "+0.0000", "+0.2500", "+1.7500"]
    assert max(map(len, table({**FACTS, "control": 1.25}).splitlines())) <= 80


def test_without_a_control_no_gain_is_claimed():
    """What lies below the loss of the model given may be the work of the text alone."""
    shown = table(FACTS)
    rows = [line.split() for line in shown.splitlines()[2:5]]
    assert rows[1] == ["DMC", "2x", "2.05", "1.5000"]
    assert rows[0][-2:] == ["1.00", "1.7500"] and rows[2][-2:] == ["2.00", "3.0000"]
    assert "+" not in shown and "-0" not in shown and "to pretrained" not in shown
    assert "--control" in shown and max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("cr", [1.0, 1.89, 2.11, 300.0])
def test_a_target_that_was_missed_is_said(cr):
    """What was aimed at and what was reached; beside it stands averaging at what was aimed at."""
    for facts in (FACTS, {**FACTS, "control": 1.25}):
        shown = table({**facts, "dmc": [{**ENTRY, "cr": cr}, {**ENTRY, "target": 3.0, "cr": 3.1}]})
        words = " ".join(shown.split())
        assert f"warning: DMC 2x missed its target: CR {cr:.2f} was reached" in words
        assert "DMC 3x missed" not in words and "every 2 tokens averaged 2.00" in words
        assert ("below" in words) == (cr < 2) and ("above" in words) == (cr > 2)
        assert max(map(len, shown.splitlines())) <= 80
    assert "warning" not in table({**FACTS, "dmc": [ENTRY]})


def test_averaging_every_token_is_no_row():
    """It would be the model itself."""
    assert "averaged" not in table({**FACTS, "dmc": [{**ENTRY, "target": 1.0, "cr": 1.0}]})
