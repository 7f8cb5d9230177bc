"""Several processes: their ranks, a model whose heads they split, and one that FSDP2 shares out.

torchrun starts the processes and tells each its rank in the environment. To generate, each rank
holds some heads of every layer (`load_part`). To train, it holds some rows of every weight
(`share_out`).
"""

import atexit
import gc
import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

import dmc
from nanodmc.checkpoint import load, random_model
from nanodmc.config import shape
from nanodmc.files import InputError
from nanodmc.variants import decide_together, of_model


def this_rank():
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def rank_count():
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device_of_this_process():
    """The GPU of this rank, as cuda:N; without GPUs the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def over_ranks(x, op="SUM"):
    """x, a tensor, replaced by its SUM, MAX or MIN over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def first_decides(work):
    """work() on the first rank alone: what it returns, or the InputError it raises, on all."""
    if not dist.is_initialized():
        return work()
    told = [None, None]
    if this_rank() == 0:
        try:
            told[0] = work()
        except InputError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    if told[1] is not None:
        raise InputError(told[1])
    return told[0]


def mean(figures):
    """The mean over the passes of a step, on all ranks."""
    return over_ranks(torch.stack(figures).mean(0)) / rank_count()


def passes_per_step(s):
    """How many forward and backward passes make up a step on each rank."""
    share = s.batch // rank_count()
    return share // (s.micro_batch or share)


# ------------------------------------------------------------------------------- heads are split

def part_of(config, ranks):
    """The Config of one rank's part of a model: its heads, and its columns of the MLPs.

    Raises InputError where they cannot be shared evenly.
    """
    for n, what in ((config.n_kv_head, "key-value heads"),
                    (config.ffn_dim, "columns of the MLPs (ffn_dim)")):
        if n % ranks:
            raise InputError(f"{ranks} ranks cannot share {n} {what} evenly; "
                             f"choose a --nproc_per_node that divides {n}.")
    if of_model(config).decide is decide_together and ranks > 1:
        raise InputError("the heads of a dmc-hardc model decide together, and several ranks split "
                         "them; run it without torchrun.")
    return replace(config, n_head=config.n_head // ranks, n_kv_head=config.n_kv_head // ranks,
                   ffn_dim=config.ffn_dim // ranks)


def joined(model):
    """This rank's part of a model, with its attention's and MLPs' outputs summed over the ranks."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if next(model.parameters()).is_cuda else "gloo")
        atexit.register(leave)
    for block in model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.register_forward_hook(lambda module, inputs, y: over_ranks(y))
    return model


def leave():
    """End the process group at the interpreter's exit, which its threads might abort otherwise.

    NCCL waits for CUDA graphs that hold its work, for ever if one lives in the frames of an error.
    """
    sys.last_exc = sys.last_value = sys.last_traceback = None
    gc.collect()
    dist.destroy_process_group()


def load_part(path, ops=dmc, device=None, dtype=None):
    """`checkpoint.load`; with several ranks, this one's part of the model.

    A part has some key-value heads with their query heads, and some columns of the MLPs.
    Embeddings, norms and lm_head are whole on every rank. Only the part moves to the device.
    """
    rank, ranks = this_rank(), rank_count()
    if ranks == 1:
        return load(path, ops, device, dtype)
    model = load(path, ops)
    model.config = part_of(model.config, ranks)
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        attention.config = model.config
        rows = attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        columns = attention.o_proj, mlp.down_proj
        for linear, dim in (*((x, 0) for x in rows), *((x, 1) for x in columns)):
            part = linear.weight.detach().chunk(ranks, dim)[rank]
            linear.weight = torch.nn.Parameter(part)
    return joined(model.to(device, dtype))


def random_part(name, ops=dmc, device=None, dtype=torch.bfloat16, **changes):
    """A model of a known shape with random weights; with several ranks, this one's part of it.

    Each rank draws its part from PyTorch's seed, which is the same for all.
    """
    config, ranks = shape(name, **changes), rank_count()
    model = random_model(part_of(config, ranks), ops, device, dtype)
    return joined(model) if ranks > 1 else model


# ----------------------------------------------------------------------------------------- FSDP2
# Its modules are imported where they are used: they take most of a second, and only training on
# several ranks needs them.

def local(x):
    """This rank's share of a tensor that FSDP2 shares out; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def share_out(model, dtype, device):
    """Shard a model with FSDP2: a rank holds its rows of every weight, and gathers layer by layer.

    The model given may stay mapped to its file: one layer at a time is converted and moved.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(torch.device(device).type, (rank_count(),))
    # inputs keep their dtype, since the angles of rotary embedding must not be in bf16
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*model.layers, model):
        fully_shard(part.to(dtype), mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")       # training calls it in the place of forward
    return model


def gathered(model):
    """The whole of a shared-out model, in the memory of rank 0. All ranks must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    with torch.device("meta"):
        whole = dmc.Transformer(model.config)
    whole.load_state_dict(weights, assign=True, strict=False)
    if model.config.tie_embeddings:
        whole.lm_head.weight = whole.embed_tokens.weight
    return whole


def control_rows(model):
    """The rows of the q and k projections that feed the control channels, (heads, dim) each.

    They are views without gradient: writing to them changes the model. Of a shared-out model,
    those rows that this rank holds.
    """
    D = model.config.head_dim

    def rows(weight):
        shared = local(weight.detach())
        first = this_rank() * -(-len(weight) // rank_count()) if shared.shape != weight.shape else 0
        return shared[-first % D::D]

    return [rows(proj.weight) for layer in model.layers
            for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)]
