"""The kernels, compiled for an H100 without one; and what works where Triton is missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dmc_fast
from nanodmc import flash_attention
from nanodmc.launch import power_of_2
from test_dmc import HERE, needs_triton, on_cpu

MODEL = dict(D=128, D_PAD=128, W=12, TILE=32, HALO=16)        # Llama 2 7B
GROUPED = dict(R=1, D=128, D_PAD=128, TILE=16)       # R 8: Llama 2 70B
STEP = dict(R=1, HALF=64, W=12, W_PAD=16, PAGE=16, WINDOWED=True, DECIDES=True, CONTROL_GAIN=0.0)
KERNELS = {                                          # name: (constants, options of the launch)
    "mask_kernel": (GROUPED, {}),
    "restore_kernel": (GROUPED, {}),
    "mask_gradient_kernel": (GROUPED, {}),
    "average_kernel": (MODEL, {}),
    "average_gradient_kernel": (MODEL, {}),
    "decision_gradient_kernel": (dict(W=12, TILE=128), {}),
    "segment_average_kernel": (dict(D=128, SLICE=32, TILE=64), {}),
    "step_kernel": (STEP, dict(num_warps=1)),
    "decode_kernel": (dict(R=1, R_PAD=16, D=128, PAGE=16, BLOCK=64), {}),
    "combine_kernel": (dict(R=1, D=128), {}),
}
FP32 = {"alpha", "omega", "cos", "sin", "open_omega", "inverse_z", "dshare", "mean_dshare",
        "dalpha", "domega", "out_lse", "part", "part_lse", "lse", "keep", "dkeep", "diagonal"}
INT32 = {"table", "lengths", "ages", "free", "left", "failed", "order"}
NUMBERS = {"T", "G", "pages_per_row", "splits"}


def kernels_of(module):
    return {name: f for name, f in vars(module).items()
            if name.endswith("_kernel") and hasattr(f, "arg_names")}


def is_stride(name):
    return "stride" in name or name.endswith(("_b", "_h", "_t"))


def argument_type(name, constants):
    if name in constants:
        return "constexpr"
    if name in NUMBERS or is_stride(name):
        return "i32"
    if name == "scale":
        return "fp32"
    return "*fp32" if name in FP32 else "*i32" if name in INT32 else "*bf16"


@needs_triton
@on_cpu
def test_every_kernel_is_compiled_below():
    assert {*kernels_of(dmc_fast), *kernels_of(flash_attention)} == KERNELS.keys()


@needs_triton
@on_cpu
@pytest.mark.parametrize("name,changes", [(name, {}) for name in KERNELS] + [
    ("mask_kernel", dict(R=8)), ("restore_kernel", dict(R=8)), ("mask_gradient_kernel", dict(R=8)),
    ("step_kernel", dict(R=8)), ("step_kernel", dict(W=1, W_PAD=1, WINDOWED=False)),
    ("step_kernel", dict(DECIDES=False)),
    ("step_kernel", dict(G=1)), ("decode_kernel", dict(splits=1)),    # 1 is compiled in
    ("decode_kernel", dict(R=8)), ("decode_kernel", dict(D=64, R=4)),
    ("average_kernel", dict(D=64, D_PAD=64))])
def test_compiles_for_an_h100(name, changes, tmp_path):
    """No register is spilled, and shared memory suffices."""
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    constants, options = {**KERNELS[name][0], **changes}, KERNELS[name][1]
    kernel = {**kernels_of(dmc_fast), **kernels_of(flash_attention)}[name]
    signature = {n: argument_type(n, constants) for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if signature[n].startswith("*") or is_stride(n)}
    binary = compile(ASTSource(kernel, signature, constants, aligned),
                     target=GPUTarget("cuda", 90, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin/cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True,
                            text=True).stdout
    registers, stack, local = (int(re.search(rf"{kind}:(\d+)", report)[1])
                               for kind in ("REG", "STACK", "LOCAL"))
    spills = stack + local                       # bytes per thread that belong into registers
    print(f"\n{name:26} {changes} registers {registers} "
          f"shared memory {binary.metadata.shared} spills {spills}", end="")
    assert spills == 0 and binary.metadata.shared <= 227 * 1024


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
