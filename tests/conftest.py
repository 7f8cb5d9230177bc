"""What several test files share: tiny runs and models, oracles, and ways to look at a run."""

import contextlib
import gc
import io
import json
import lzma
import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

import dmc
import train
from nanodmc import checkpoint, cli, files
from nanodmc.config import SHAPES
from nanodmc.tokenizer import Tokenizer
from test_dmc import config_of

HERE = Path(__file__).parent.parent          # where the two commands are


def pytest_collection_modifyitems(items):
    """The process that tests kernels runs beside all other tests, so it is waited for last."""
    items.sort(key=lambda item: item.name == "test_kernels_in_the_interpreter")


@pytest.fixture(scope="module", autouse=True)
def collector_passes_over_what_is_there():
    """A run calls the garbage collector after each phase. In a process that has imported half of
    the world, that would take most of a tiny run's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ------------------------------------------------------------------------------ a tiny training run

RETROFIT = ["--context", "16", "--batch", "2", "--free-steps", "3", "--retrofit-steps", "5",
            "--solidify-steps", "3", "--cr", "3", "--keep", "2", "3", "--eval-sequences", "4",
            "--save-every", "4", "--log-every", "3", "--warmup", "2", "--c", "0"]
TINY = ["--layers", "1", "--heads", "2", "--kv-heads", "1", "--dim", "8", "--ffn-dim", "8",
        "--pretrain-steps", "6", *RETROFIT]
SHORT = ["--pretrain-steps", "2", "--keep", "3", "--solidify-steps", "1"]
LEAN = ["--precision", "bf16", "--micro-batch", "1"]


@pytest.fixture(scope="session", autouse=True)
def cache_of_tokens(tmp_path_factory):
    """Where runs keep tokenized text, instead of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["XDG_CACHE_HOME"]) / "dmc"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """The path of a text to train on."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(f"{i} times {i + 1} is {i * (i + 1)}, as everyone knows."
                              for i in range(300)))
    return str(path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, text):
    """A run that nobody interrupted: its folder `out`, and what it `printed`."""
    folder = tmp_path_factory.mktemp("runs")
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(screen),
          single_threaded()):
        patch.chdir(folder)
        assert train.main(["--out", "finished", "--data", text, *TINY]) == 0
    screen.seek(0)
    return types.SimpleNamespace(out=folder / "finished", printed=screen.read())


@pytest.fixture(scope="session")
def finished(finished_run):
    """The folder of that run. No test changes it, other than by resuming it."""
    return finished_run.out


def curve(out):
    """The lines of metrics.jsonl without what depends on the clock or the machine."""
    entries = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    measured = ("tokens_per_second", "mfu", "peak_gb")
    return [{key: x for key, x in entry.items() if key not in measured} for entry in entries]


def summary(out):
    """summary.json without what depends on the clock or the command line."""
    facts = json.loads((Path(out) / "summary.json").read_text())
    return {key: x for key, x in facts.items() if key not in ("seconds", "command")}


def same_weights(run, other, folder="cr3"):
    """Whether two runs made the same model."""
    ours, theirs = (checkpoint.load(path / folder).state_dict() for path in (run, other))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


class PowerCut(BaseException):
    pass


def dies(*args, **kwargs):
    raise PowerCut


@contextlib.contextmanager
def before_step(at, act):
    """Meanwhile, training calls act(model) before its step `at`, counted over all phases."""
    step, calls = train.train_step, iter(range(100))

    def train_step(model, *args, **kwargs):
        if next(calls) == at:
            act(model)
        return step(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train_step)
        yield


def ctrl_c(*_):
    """As if somebody at the terminal pressed these keys."""
    signal.raise_signal(signal.SIGINT)


def interrupted(out, text, act=ctrl_c, arguments=(), at=5):
    """A tiny run in which act(model) is called before step `at`. Returns its exit code."""
    with before_step(at, act):
        return train.main(["--out", str(out), "--data", text, *TINY, *arguments])


def two_processes(script, *arguments):
    """What became of a script that torchrun started twice: subprocess's CompletedProcess."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         *map(str, (script, *arguments))], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})


@contextlib.contextmanager
def single_threaded():
    """For many small operations, which a second thread only delays."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """Faster for tiny models, by far on a busy machine."""
    with single_threaded():
        yield


# ---------------------------------------------------------------------------------- what is refused

def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(main, arguments, capsys, folder):
    """What a command says on stderr that refuses its input: one line. It leaves `folder` alone."""
    before = snapshot(folder)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert snapshot(folder) == before and "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    return said


@pytest.fixture
def messy_folder(tmp_path, monkeypatch, finished):
    """The current folder, in which most files are no use to either command."""
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "short").write_text("short")
    (tmp_path / "shortish").write_text("x" * 200)
    (tmp_path / "results").touch()
    (tmp_path / "truncated").mkdir()
    weights = (finished / "cr2/model.safetensors").read_bytes()
    (tmp_path / "truncated/model.safetensors").write_bytes(weights[:len(weights) // 2])
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -------------------------------------------------------------------------------------- checkpoints

POINTER = f"{files.LFS_POINTER}v1\noid sha256:0\nsize 9\n"         # what git-lfs leaves of a file


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A small plain checkpoint over bytes, as somebody might hand it over."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    torch.manual_seed(1)
    model = dmc.Transformer(config_of((4, 2), vocab_size=257, dmc=False))
    checkpoint.save(model, folder, Tokenizer.bytes())
    return folder


@pytest.fixture
def tiny_shape(monkeypatch):
    """A known shape that is tiny."""
    monkeypatch.setitem(SHAPES, "tiny", dict(
        vocab_size=300, n_layer=1, n_head=4, n_kv_head=2, dim=16, ffn_dim=24, max_seq_len=64))


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def largest_error(ours, theirs):
    """Relative to the largest of theirs."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def lines_of(path):
    """The results of a file of prompts, in the order of the prompts."""
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: line["line"])


# ------------------------------------------------------------------------------ oracles and figures

def oracle(name):
    """An independent implementation to compare with; requirements-dev.txt has them."""
    reason = f"{name} is not installed; pip install -r requirements-dev.txt"
    return pytest.importorskip(name, reason=reason)


@pytest.fixture(scope="session")
def smollm2():
    folder = os.environ.get("DMC_SMOLLM2")
    if not folder:
        pytest.skip("DMC_SMOLLM2 names no folder with SmolLM2-135M; "
                    ".ci/run makes one where its tool is at hand")
    return Path(folder)


@pytest.fixture(scope="session")
def smollm2_pair(smollm2):
    """The model in fp32, ours and transformers'."""
    theirs = oracle("transformers").LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return checkpoint.load(smollm2, dtype=torch.float32), theirs.eval()


@pytest.fixture(scope="session")
def english():
    path = Path(os.environ.get("DMC_CORPUS") or HERE.parent / "shared/data/corpus-val.txt.xz")
    if not path.is_file():
        pytest.skip(f"no English text at {path}; DMC_CORPUS may name another .txt.xz file")
    return lzma.decompress(path.read_bytes()).decode()


@pytest.fixture(scope="session")
def measured():
    """Figures that tests leave; DMC_RESULTS names a JSON file for them."""
    figures = {}
    yield figures
    if out := os.environ.get("DMC_RESULTS"):
        named = [f"{name}=..." for name in ("DMC_SMOLLM2", "DMC_MEGATRON") if name in os.environ]
        command = " ".join([*named, f"DMC_RESULTS=results/{Path(out).name} python -m pytest",
                            shlex.join(sys.argv[1:])])
        files.write_json(out, {**figures, **cli.provenance(), "command": command})


AWKWARD = st.sampled_from([
    "▁", " ", "  ", " " * 17, "\n", "\r\n", "\t", "\x00", "\x04", "\x1d", "\x7f", "\x85", "\xa0",
    "\xad", "\u3000", "\ufeff", "\ufffd", "'s", "'S", "'\u017f", "12345", "½", "Ⅷ", "é",
    "e\u0301", "🙂", "👨\u200d👩", "中文", "\U000c0000", "\U0010ffff", "<s>", " </s>",
    "<|start|>", "<s", "the", "def ", "==", "=====", "aaaaaaaa"])
TEXTS = st.one_of(st.text(), st.lists(st.one_of(AWKWARD, st.text(max_size=3)), max_size=12)
                  .map("".join))         # texts that tokenizers split in surprising ways
