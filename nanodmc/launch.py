"""Whether Triton's kernels run here, and what every kernel needs: for dmc_fast and flash_attention.

With TRITON_INTERPRET=1 in the environment before the first import, kernels run on the CPU, slowly,
for tests. Without Triton everything but the kernels works.
"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                          # there is none for this machine
    triton = tl = None

# a product and its sum are one instruction, which Triton wants to be told from 3.10 on
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def uses_kernels(device):
    """Whether kernels run for tensors on a device; None: the CPU."""
    return triton is not None and (torch.device(device or "cpu").type == "cuda" or INTERPRETED)


def in_kernels(x):
    """Whether kernels run for what is like the tensor x; there are none in fp64.

    Raises ValueError as `check_current`.
    """
    runs = uses_kernels(x.device) and x.dtype != torch.float64
    if runs:
        check_current(x.device)
    return runs


def check_current(device):
    """Raises ValueError for a GPU that is not the current one, on which Triton runs its kernels."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(f"kernels run on the current GPU, and the tensors are on {device}; call "
                         f"torch.cuda.set_device({device.index}) first")


def capturing(device):
    """Whether what runs on this device now becomes a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def jit(f):
    """triton.jit, or f itself where there is no Triton and nobody can call it."""
    return triton.jit(f) if triton else f


def power_of_2(n):
    """The smallest power of 2 that is at least n: the size of a kernel's block that holds n."""
    return 1 << max(0, n - 1).bit_length()
