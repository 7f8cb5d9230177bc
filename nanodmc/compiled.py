"""What the kernels become on an H100, read off their compiled code: no GPU is needed.

    python -m nanodmc.compiled          a table, and results/kernels-sm90.json

Triton compiles each kernel at the size of Llama 2 7B, and its cuobjdump lists registers and
instructions. From these follows how long a program takes alone (`alone`), and from that the share
of the card's bandwidth that all of them reach together (`share`). That is a rough model, to judge
a change by; it has not been held against a GPU.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import dmc_fast
from nanodmc import decisions, mask_kernels, segment_average, short_step
from nanodmc.cli import ROOT, installing, provenance, run_command
from nanodmc.files import InputError, write_json
from nanodmc.launch import triton

# --------------------------------------------------------------------------------------- the card

SMS, CLOCK, BANDWIDTH = 132, 1.755e9, 3.35e12     # of an H100 SXM
COPY = 0.92                     # of it, what a copy reaches
REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 233472, 64, 32          # of each SM
LATENCY = 6e-7                  # seconds that a load takes
CYCLES = 5                      # from one instruction of a warp to its next

# ------------------------------------------------------------------------- kernels and their sizes

T, D, W = 4096, 128, 12
BAND = dict(D=D, D_PAD=D, W=W, TILE=32, HALO=16)
GROUPED = dict(R=1, D=D, D_PAD=D, TILE=16)
TURNING = dict(R=1, HALF=D // 2, HALF_PAD=D // 2, TILE=16, TURN=True)
STEP = dict(R=1, HALF=D // 2, W=W, W_PAD=16, PAGE=16, WINDOWED=True, DECIDES=True, TOLD=False,
            CONTROL_GAIN=0.0)
SLOTS = 1024                    # of a head, in decode_kernel


@dataclass(frozen=True)
class Case:
    """A kernel at one size."""
    constants: dict
    moved: int | None = None    # bytes that a program reads and writes once; None: hardly any
    trips: int = 1              # through its loop
    warps: int = 4


CASES = {
    "mask_kernel": Case(TURNING, 16 * 8 * D),
    "restore_kernel": Case(GROUPED, 16 * 6 * D),
    "mask_gradient_kernel": Case(TURNING, 16 * 22 * D),
    "average_kernel": Case(BAND, 32 * 8 * D),
    "average_gradient_kernel": Case({**BAND, "TILE": 16, "TILES": 8}, 128 * (12 * D + 4 * W), 8),
    "decision_gradient_kernel": Case(dict(W=W, TILE=128), 128 * (4 * W + 24)),
    "segment_average_kernel": Case(dict(D=D, SLICE=32, TILE=64), T * 4 * 32, T // 64),
    "step_kernel": Case(STEP, warps=1),
    "decision_kernel": Case(dict(R=1, TILE=256), 256 * 80),
    "decision_backward_kernel": Case(dict(TILE=256), 256 * 32),
    "decode_kernel": Case(dict(R=1, R_PAD=16, D=D, PAGE=16, BLOCK=64), SLOTS * 4 * D, SLOTS // 64),
    "combine_kernel": Case(dict(R=1, D=D)),
    "add_norm_kernel": Case(dict(N=4096, N_PAD=4096), 8 * 4096, warps=8),
    "silu_product_kernel": Case(dict(TILE=1024), 6 * 1024),
}
FP32 = {"alpha", "omega", "cos", "sin", "open_omega", "inverse_z", "dshare", "mean_dshare",
        "dalpha", "domega", "uniform", "dlogit", "dmean", "part", "part_lse", "lse", "keep",
        "dkeep", "diagonal"}
INT32 = {"table", "lengths", "ages", "free", "left", "failed", "items", "places"}
NUMBERS = {"T", "G", "N", "pages_per_row", "rows"}


def kernels():
    """The kernels by name."""
    modules = dmc_fast, decisions, mask_kernels, segment_average, short_step
    return {name: f for module in modules for name, f in vars(module).items()
            if name.endswith("_kernel") and hasattr(f, "arg_names")}


def is_stride(name):
    return "stride" in name or name.endswith(("_b", "_h", "_t"))


def argument_type(name, constants):
    """As Triton writes the type of a kernel's argument."""
    if name in constants:
        return "constexpr"
    if name in NUMBERS or is_stride(name):
        return "i32"
    if name in ("scale", "c", "eps", "noise", "tau"):
        return "fp32"
    return "*fp32" if name in FP32 else "*i32" if name in INT32 else "*bf16"


# ----------------------------------------------------------------------------------- compiled code

@dataclass(frozen=True)
class Code:
    """What is read off one compiled kernel; see `figures` for what each entry means."""
    registers: int
    spills: int
    shared: int
    instructions: int
    waits: int
    widest: int
    in_flight: int


def compile_kernel(name, changes=None):
    """The Code of a kernel for an H100, at its size in CASES but for `changes` of its constants."""
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    case, kernel = CASES[name], kernels()[name]
    constants = {**case.constants, **(changes or {})}
    signature = {n: argument_type(n, constants) for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if signature[n].startswith("*") or is_stride(n)
               or n == "N" and n not in constants}
    binary = compile(ASTSource(kernel, signature, constants, aligned),
                     target=GPUTarget("cuda", 90, 32), options=dict(num_warps=case.warps))
    tool = Path(nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(binary.asm["cubin"])
        usage, listing = (subprocess.run([tool, flag, file], capture_output=True, text=True,
                                         check=True).stdout
                          for flag in ("--dump-resource-usage", "-sass"))
    registers, stack, local = (int(re.search(rf"{kind}:(\d+)", usage)[1])
                               for kind in ("REG", "STACK", "LOCAL"))
    return Code(registers, stack + local, binary.metadata.shared, *followed(listing, case.trips))


LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def followed(listing, trips):
    """Instructions, waits for loads, the widest load, and the most bytes in flight of a thread.

    listing: cuobjdump's. An instruction that reads what an earlier load brings waits for all loads
    before it. The longest loop is gone through `trips` times, and its instructions and waits count
    as often.
    """
    code = [(int(at, 16), op.split("."), args) for at, op, args in LINE.findall(listing)]
    loops = [(int(target[1], 16), at) for at, op, args in code if op[0] == "BRA"
             and (target := re.search(r"0x([0-9a-f]+)", args)) and int(target[1], 16) < at]
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(1, 0))
    instructions = waits = widest = most = copies = 0
    pending = {}                                    # registers on their way, and their bytes
    for at, op, args in code:
        times = trips if begin <= at <= end else 1
        instructions += times
        registers = [int(r) for r in re.findall(r"\bR(\d+)", args)]
        reads = registers if op[0] in ("STG", "STS", "LDGSTS") else registers[1:]
        if pending.keys() & set(reads) or op[0] == "DEPBAR" and copies:
            waits += times
            pending, copies = {}, 0
        if op[0] in ("LDG", "LDGSTS"):
            size = next((BYTES[part] for part in op if part in BYTES), 4)
            widest = max(widest, size)
            if op[0] == "LDG":
                pending |= {registers[0] + i: min(size, 4) for i in range(max(1, size // 4))}
            else:                                   # straight to shared memory
                copies += size
            most = max(most, sum(pending.values()) + copies)
    return instructions, waits, widest, most


# ----------------------------------------------------------------------------------------- figures

def figures(name, code):
    """What the table has of a kernel, as a dict.

    registers, spills (bytes) of a thread; shared: bytes of a program; programs: that an SM holds;
    load: bytes of its widest load; in_flight: KB that an SM waits for at most; instructions and
    waits of a thread; share: of a copy's bandwidth, and what limits it.
    """
    case = CASES[name]
    allocated = -(-code.registers // 8) * 8 * 32 * case.warps
    programs = min(REGISTERS // allocated, SHARED // (code.shared + 1024), WARPS // case.warps,
                   PROGRAMS)
    entry = {"kernel": name, "registers": code.registers, "spills": code.spills,
             "shared": code.shared, "programs": programs, "load": code.widest,
             "in_flight_kb": programs * case.warps * 32 * code.in_flight / 1024,
             "instructions": code.instructions, "waits": code.waits, "share": None, "limit": None}
    if case.moved:
        entry |= share(case, code, programs)
    return entry


def alone(code):
    """Seconds that a program takes if nothing else runs."""
    return code.waits * LATENCY + code.instructions * CYCLES / CLOCK


def share(case, code, programs):
    """The share of a copy's bandwidth that a kernel reaches, at most 1, and what limits it.

    Either that memory is busy; or that an SM's programs wait or follow long chains, each for the
    time that it takes alone; or that its four schedulers issue an instruction in every cycle.
    """
    bandwidth = COPY * BANDWIDTH / SMS              # of one SM
    issued = code.instructions * case.warps / 4 / CLOCK
    bounds = {"memory": 1.0, "time of a program": programs * case.moved / alone(code) / bandwidth,
              "instructions": case.moved / issued / bandwidth}
    limit = min(bounds, key=bounds.get)
    return {"share": round(bounds[limit], 2), "limit": limit}


def table(rows):
    """The figures as a table in Markdown."""
    head = ("kernel", "registers", "spills", "shared, KB", "programs per SM", "widest load, bytes",
            "in flight per SM, KB", "waits", "instructions", "share of copy bandwidth", "limit")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        predicted = "-" if row["share"] is None else f"{row['share']:.2f}"
        cells = (f"`{row['kernel']}`", row["registers"], row["spills"],
                 f"{row['shared'] / 1024:.0f}", row["programs"], row["load"],
                 f"{row['in_flight_kb']:.0f}", row["waits"], f"{row['instructions']:,}", predicted,
                 row["limit"] or "-")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def measure():
    """Print the table, and write results/kernels-sm90.json."""
    if triton is None:
        raise InputError(f"Triton is not installed; install it with: {installing('triton')}")
    rows = [figures(name, compile_kernel(name)) for name in CASES]
    print(table(rows), end="")
    write_json(ROOT / "results/kernels-sm90.json", {"rows": rows, **provenance()})


if __name__ == "__main__":
    sys.exit(run_command("compiled.py", measure))
