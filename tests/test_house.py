"""The shape of the project: which module may use which, and how wide its files are."""

import ast
import shutil
import subprocess
import sys

import pytest

from conftest import HERE

ORDER = [["dmc"],
         ["launch", "large_scores", "mask_kernels", "flash_attention", "banded_average",
          "segment_average", "padded_cache", "strips", "pages", "work_list", "decisions"],
         ["dmc_fast"],
         *([name] for name in (
             "interrupts", "files", "machine", "locks", "terminal", "cli", "variants", "short_step",
             "control_pair", "config", "weights", "checkpoint", "parallel", "added_tokens",
             "splits", "merge_order", "tokenizer", "megatron", "documents", "token_cache", "text",
             "phases", "records", "settings", "resumed", "tables", "losses", "first_decisions",
             "optim", "starts", "evaluate", "baselines", "policies", "requests", "sampling",
             "plots", "stopping", "claim", "state", "metrics", "runs", "heldout", "contenders",
             "comparison", "seeds", "history", "compare", "pool", "engine", "chat", "results",
             "prompts", "merges", "analyses", "peers", "cases", "throughput", "bench", "scoring",
             "humaneval", "harness", "benchmarks", "compiled")),
         ["train", "generate"]]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
NONE = "__init__", "modeling_dmc"        # the latter is copied beside weights, and never imported
MODULES = {**{path.stem: path for path in HERE.glob("nanodmc/*.py") if path.stem not in NONE},
           **{name: HERE / f"{name}.py" for name in ("dmc", "dmc_fast", "train", "generate")}}


def imported(path):
    """The full names of what a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relative to itself"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def uses(path):
    """Those of our modules that a file imports."""
    parts = (name.split(".") for name in imported(path))
    return {name[1] if name[0] == "nanodmc" else name[0] for name in parts
            if name[0] == "nanodmc" or name[0] in LEVEL}


def test_every_module_has_its_place():
    assert MODULES.keys() == LEVEL.keys()
    assert (HERE / "nanodmc/__init__.py").read_text() == ""


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_point_one_way(name):
    """A module imports only from those before it; among the first ones, files say what is what."""
    for used in uses(MODULES[name]):
        assert used in LEVEL, f"{name} imports {used}"
        same = name in ORDER[1] and LEVEL[used] == LEVEL[name] and ORDER[1].index(used) < ORDER[
            1].index(name)
        assert LEVEL[used] < LEVEL[name] or same, f"{name} imports {used}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_a_command(name):
    assert not uses(MODULES[name]) & {"train", "generate"}


def test_the_method_needs_torch_and_nothing_else():
    needed = {name.split(".")[0] for name in imported(HERE / "dmc.py")}
    assert needed - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_opens_with_what_it_is_for(name):
    opening = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    assert opening and opening.split("\n\n")[0].rstrip().endswith(".")


def test_lines_are_at_most_100_characters_wide():
    files = [path for pattern in ("*.py", "nanodmc/*.py", "nanodmc/*.html", "tests/*.py")
             for path in HERE.glob(pattern)]
    assert HERE / "dmc.py" in files and HERE / "nanodmc/merges.html" in files
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{path}:{number} is {len(line)} wide"


def test_the_method_travels_alone(tmp_path):
    shutil.copy(HERE / "dmc.py", tmp_path)
    run = subprocess.run([sys.executable, "-I", "dmc.py"], cwd=tmp_path, capture_output=True,
                         text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1].rstrip(".")) < 1e-6
