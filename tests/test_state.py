"""Properties of nanodmc/state.py, records.py and claim.py: nothing in a run's folder is trusted."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

import train
from conftest import (
    HERE,
    SHORT,
    TINY,
    PowerCut,
    curve,
    dies,
    edit_json,
    interrupted,
    refusal,
    same_weights,
    snapshot,
)
from nanodmc import state
from nanodmc.files import InputError
from nanodmc.locks import Lock
from nanodmc.records import read_curve, read_sealed, write_sealed

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny models


@pytest.fixture(scope="module")
def killed(tmp_path_factory, text):
    """A run that died in its retrofit, behind a saved state."""
    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(PowerCut):
        interrupted(out, text, dies, at=13)
    return out


@pytest.fixture
def out(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run")


def resume(out, *more):
    return ["--resume", "--out", str(out), *more]


# ------------------------------------------------------------------------------ nobody else writes

def test_a_second_process_hears_who_writes_and_changes_nothing(out, text, capsys):
    with Lock(out / ".lock", "the run"):
        for arguments in (resume(out), ["--out", str(out), "--data", text, *TINY]):
            told = refusal(train.main, arguments, capsys, out)
            assert f"is being written by process {os.getpid()}" in told
    assert train.main(resume(out)) == 0 and not (out / ".lock").exists()


def test_runs_take_numbers_that_nobody_has(tmp_path, text):
    """Several at once."""
    command = [sys.executable, HERE / "train.py", "--data", text, *TINY, *SHORT]
    runs = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [run.wait(timeout=100) for run in runs] == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.glob("runs/*")) == ["1", "2", "3"]
    for number in (2, 3):
        assert curve(tmp_path / f"runs/{number}") == curve(tmp_path / "runs/1")


def test_a_refused_run_gives_its_folder_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", "missing.txt"]) == 2 and not list(tmp_path.iterdir())
    assert train.main(["--data", "missing.txt", "--out", "a/b"]) == 2
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- nothing is executed

class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def call_tensors_bytes(folder):
    """An index of PyTorch's own classes, by which the tensors' file is a pickle to be loaded."""
    index, file = folder / ".metadata", "__0_0.distcp"
    metadata = pickle.loads(index.read_bytes())
    names, size = list(metadata.state_dict_metadata), (folder / file).stat().st_size
    metadata.state_dict_metadata = {name: BytesStorageMetadata() for name in names}
    metadata.storage_data = {MetadataIndex(name): _StorageInfo(file, 0, size) for name in names}
    index.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("name,as_bytes", [(".metadata", False), ("__0_0.distcp", False),
                                           ("__0_0.distcp", True)])
def test_a_hostile_state_executes_nothing(out, tmp_path, capsys, name, as_bytes, checked):
    """Neither where its checksums fit, nor where an older version made none."""
    folder, marker = next(out.glob("state-*")), tmp_path / "marker"
    (folder / name).write_bytes(pickle.dumps(Hostile(marker)))
    if as_bytes:
        call_tensors_bytes(folder)

    def seal(record):
        del record["checksum"], record["curve"], record["files"]
        if checked:
            record["files"] = state.checksums(folder)
    edit_json(out / "state.json", seal)
    if checked:
        write_sealed(out / "state.json", json.loads((out / "state.json").read_text()))
    assert "damaged" in refusal(train.main, resume(out), capsys, out)
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists()                               # it would have run


@pytest.mark.parametrize("word", ["os.system", "builtins.eval", "torch.load", "pathlib.Path",
                                  "torch.distributed.checkpoint.metadata.os"])
def test_no_other_class_is_found(word):
    with pytest.raises(pickle.UnpicklingError, match="no place"):
        state.Unpickler(io.BytesIO()).find_class(*word.rsplit(".", 1))


# --------------------------------------------------------------------------- damage is no surprise

@pytest.mark.parametrize("name", ["run.json", "state.json", "metrics.jsonl", "state-2-4/.metadata",
                                  "state-2-4/__0_0.distcp", "freed/figures.json"])
def test_a_flipped_bit_is_noticed(out, finished, capsys, name):
    """And --redo makes anew what it spoils, but for the settings, which nobody else knows."""
    whole = snapshot(out)
    path = out / name
    first = whole[path].find(b'{"index": 1')             # of the phase "free"
    place = first if first >= 0 else len(whole[path]) // 2
    for at in (place, place + 1):
        data = bytearray(whole[path])
        data[at] ^= 1
        path.write_bytes(data)
        told = refusal(train.main, resume(out), capsys, out) if name[0] != "f" else str(path)
        assert str(path) in told or str(path.parent) in told
    assert train.main(resume(out, "--redo")) == (2 if name == "run.json" else 0)
    if name != "run.json":
        assert curve(out) == curve(finished) and same_weights(out, finished)


def test_weights_that_a_phase_starts_from_are_verified(out, finished, capsys):
    path = out / "pretrained/model.safetensors"              # which the control starts from
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert train.main(resume(out)) == 2
    assert "not those that were saved; restore it, or add --redo" in capsys.readouterr().err
    assert train.main(resume(out, "--redo")) == 0
    assert curve(out) == curve(finished) and same_weights(out, finished)


@pytest.mark.parametrize("change", [lambda lines: lines[1:], lambda lines: lines[:3] + lines[4:],
                                    lambda lines: lines[:4] + ["{"] + lines[4:],
                                    lambda lines: ["[1]", *lines[1:]], lambda lines: []])
def test_a_curve_with_a_hole_is_refused(out, capsys, change):
    path = out / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))
    assert f"{path} is damaged" in refusal(train.main, resume(out), capsys, out)


ODD = [None, True, -1, 1e300, 10 ** 30, "x", [], {}, [[None]]]


@pytest.mark.parametrize("key", ["phase", "step", "seconds", "tensors", "files"])
def test_odd_values_of_a_state_are_refused(out, capsys, key):
    record = read_sealed(out / "state.json", {"phase", "step", "seconds", "tensors"},
                         {"files", "curve"})
    for value in ODD:
        if (key, value) == ("files", None):                 # as of old states
            continue
        write_sealed(out / "state.json", record | {key: value})
        told = refusal(train.main, resume(out), capsys, out)
        assert "damaged" in told and "state" in told, value


def test_odd_settings_are_refused(out, capsys):
    record = json.loads((out / "run.json").read_text())
    del record["checksum"]
    for name in record["settings"]:
        for value in (True, 10 ** 30, "x", {}, [[None]]):
            if (name, value) in (("init", "x"), ("field", "x")) or value is True and name in (
                    "control", "random_weights", "choose_pair", "fit_decisions"):
                continue
            changed = record["settings"] | {name: value}
            write_sealed(out / "run.json", record | {"settings": changed})
            assert "run.json is damaged" in refusal(train.main, resume(out), capsys, out), name


def test_a_run_of_an_older_version_goes_on(out, finished):
    """Without checksums, and without a setting that is newer than it."""
    for name, keys in (("run.json", ["checksum"]), ("state.json", ["checksum", "files", "curve"]),
                       ("freed/figures.json", ["checksum"])):
        edit_json(out / name, lambda record, keys=keys: [record.pop(key) for key in keys])
    edit_json(out / "run.json", lambda record: record["settings"].pop("distill"))
    assert train.main(resume(out)) == 0
    assert curve(out) == curve(finished)


def test_a_curve_may_end_in_zeros(tmp_path):
    path, entry = tmp_path / "metrics.jsonl", {"index": 0, "step": 0, "phase": "pretrain",
                                               "loss": 1.0, "cr": None, "target_cr": None}
    path.write_bytes(json.dumps(entry).encode() + b"\n{\"inde" + bytes(100))
    assert read_curve(path) == [entry]


# -------------------------------------------------------------------------- what a kill leaves goes

def test_what_a_kill_left_goes_when_the_run_goes_on(out):
    for folder in ("state-1-2", ".run.json.01234567.partial", "pretrained/.x.01234567.partial"):
        (out / folder).mkdir()
        (out / folder / "file").write_text("part")
    mine = out / "state-of-mind", out / "state-notes.txt"        # are nobody's leftovers
    mine[0].mkdir()
    mine[1].write_text("mine")
    assert train.main(resume(out)) == 0
    assert not list(out.glob("**/*.partial")) and sorted(out.glob("state-*")) == sorted(mine)


def test_a_state_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(state, "sync", synced.append)
    sums = state.save_tensors(tmp_path / "state", {"weights": torch.ones(3)})
    assert {path.name for path in synced} == {"state", tmp_path.name, *sums}
    found = {"weights": torch.zeros(3)}
    state.load_tensors(tmp_path / "state", found, sums, "remedy")
    assert found["weights"].tolist() == [1, 1, 1]
    with pytest.raises(InputError, match=r"checksums are others\); remedy"):
        state.load_tensors(tmp_path / "state", found, sums | {"__0_0.distcp": "0"}, "remedy")
