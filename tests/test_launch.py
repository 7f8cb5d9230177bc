"""The kernels, compiled for an H100 without one; and what works where Triton is missing."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanodmc import compiled
from nanodmc.launch import in_kernels, power_of_2
from test_dmc import HERE, needs_triton, on_cpu


@needs_triton
@on_cpu
def test_every_kernel_is_compiled_below():
    assert compiled.kernels().keys() == compiled.CASES.keys()


@needs_triton
@on_cpu
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name,changes", [(name, {}) for name in compiled.CASES] + [
    ("mask_kernel", dict(R=8)), ("restore_kernel", dict(R=8)), ("mask_gradient_kernel", dict(R=8)),
    ("step_kernel", dict(R=8)), ("step_kernel", dict(W=1, W_PAD=1, WINDOWED=False)),
    ("step_kernel", dict(DECIDES=False)), ("step_kernel", dict(TOLD=True)),
    ("step_kernel", dict(G=1)), ("decode_kernel", dict(R=8)), ("decode_kernel", dict(D=64, R=4)),
    ("average_kernel", dict(D=64, D_PAD=64)), ("average_gradient_kernel", dict(D=64, D_PAD=64))])
def test_compiles_for_an_h100(name, changes):
    """No register is spilled, and shared memory suffices."""
    code = compiled.compile_kernel(name, changes)
    assert code.spills == 0 and code.shared <= 227 * 1024


@needs_triton
def test_tensors_on_another_gpu_than_the_current_one_are_refused(monkeypatch):
    """Triton would run a kernel there with pointers to where it cannot read."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    on = lambda number: SimpleNamespace(device=torch.device("cuda", number), dtype=torch.float16)
    assert in_kernels(on(0))
    with pytest.raises(ValueError, match=r"on cuda:1; call torch.cuda.set_device\(1\) first"):
        in_kernels(on(1))


LISTING = """
    /*0000*/  LDG.E.128 R4, [R2.64] ;
    /*0010*/  @!P0 LDG.E.U16.CONSTANT R8, desc[UR6][R10.64+0x2] ;
    /*0020*/  IADD3 R1, R20, R21, RZ ;
    /*0030*/  FMUL R12, R7, R1 ;
    /*0040*/  LDG.E R9, [R2.64] ;
    /*0050*/  STG.E [R2.64], R9 ;
    /*0060*/  @P1 BRA 0x40 ;
    /*0070*/  LDGSTS.E.BYPASS.128 [R30], [R2.64] ;
    /*0080*/  DEPBAR.LE SB0, 0x0 ;
    /*0090*/  EXIT ;
    /*00a0*/  BRA 0xa0 ;
"""


def test_a_listing_is_followed():
    """The first two loads fly together, the third is waited for in a loop, the last is a copy."""
    instructions, waits, widest, in_flight = compiled.followed(LISTING, trips=10)
    assert (instructions, waits, widest, in_flight) == (11 + 9 * 3, 1 + 10 + 1, 16, 18)


def test_the_table_in_the_docs_is_the_measured_one():
    rows = json.loads((HERE / "results/kernels-sm90.json").read_text())["rows"]
    assert compiled.table(rows) in (HERE / "docs/gpu.md").read_text()
    assert [row["kernel"] for row in rows] == list(compiled.CASES)


def test_the_share_has_the_least_of_its_bounds():
    """Less waiting, more programs, fewer instructions: never a smaller share."""
    case = compiled.Case({}, moved=10_000)
    code = compiled.Code(64, 0, 0, instructions=500, waits=4, widest=16, in_flight=64)
    for better in (replace(code, waits=3), replace(code, instructions=400)):
        assert compiled.share(case, better, 4)["share"] >= compiled.share(case, code, 4)["share"]
    alone = compiled.alone(code)
    assert alone == pytest.approx(4 * 6e-7 + 500 * 5 / 1.755e9)
    share = compiled.share(case, code, 2)
    assert share["limit"] == "time of a program"
    assert share["share"] == pytest.approx(2 * 10_000 / alone / (0.92 * 3.35e12 / 132), abs=0.005)


def test_a_block_holds_what_it_must():
    for n in range(1, 130):
        size = power_of_2(n)
        assert size.bit_count() == 1 and n <= size < 2 * n


WITHOUT_TRITON = """
import sys
import torch
sys.modules["triton"] = None
import dmc
import dmc_fast
from nanodmc.launch import uses_kernels
assert not uses_kernels("cpu") and not uses_kernels("cuda")
torch.manual_seed(0)
config = dmc.Config(vocab_size=9, n_layer=1, n_head=2, n_kv_head=1, dim=8, ffn_dim=8,
                    max_seq_len=32, c=0.0)
plain, fast = dmc.Transformer(config), dmc.Transformer(config, dmc_fast)
fast.load_state_dict(plain.state_dict())
tokens = torch.randint(0, 9, (1, 20))
caches = dmc.Cache(config, 1), dmc_fast.Cache(config, 1), dmc_fast.Cache(config, 1, pages=4)
for model, cache in zip((plain, fast, fast), caches):
    for part in tokens.split([15, 5], dim=1):
        expected = plain(tokens)[0][:, cache.seen[0]:][:, :part.size(1)]
        assert (model(part, cache)[0] - expected).abs().max() < 1e-5
fast(tokens, noise=True)[0].sum().backward()
"""


@on_cpu
def test_without_triton_all_but_the_kernels_works():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=HERE, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
