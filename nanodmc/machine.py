"""What the machine at hand can do: the memory that is free, and whether it is slow in bf16."""

import warnings

import torch

from nanodmc.files import read_lines

ROOM = 0.75              # of the memory that is free, which a plan may take where it has a choice


def free_memory(device):
    """Bytes free on a device, the GPU or the machine itself; None: nobody knows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return next((int(line.split()[1]) * 1024 for line in read_lines("/proc/meminfo")
                 if line.startswith("MemAvailable")), None)


def slow_in_bf16(device):
    """Whether a device takes several times as long for matrix products in bf16 as in fp32.

    So does a CPU for which PyTorch has only plain loops, such as one with AVX2 and no more.
    """
    fast = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.device(device).type == "cpu" and not (fast and fast())


def fast_model(model):
    """The model given, its half precision made fp32 where that is faster and memory allows it."""
    weight = next(model.parameters())
    if weight.dtype.itemsize > 2 or not slow_in_bf16(weight.device):
        return model
    free, needed = free_memory(weight.device), 4 * sum(p.numel() for p in model.parameters())
    if free is None or needed <= ROOM * free:
        return model.float()
    warnings.warn(f"this processor is slow in half precision, and {needed / 1e9:.1f} GB for fp32 "
                  "are not free; the model stays as it is stored.", stacklevel=2)
    return model
