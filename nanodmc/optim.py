"""AdamW, with stochastic rounding for weights in bf16; the memory and work that training takes."""

import gc
import resource
import sys
import weakref
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from dmc import Transformer
from nanodmc.files import InputError
from nanodmc.losses import BLOCK
from nanodmc.machine import ROOM, free_memory
from nanodmc.parallel import device_of_this_process, local, over_ranks, rank_count, share_out

CHUNK = {"cuda": 2 ** 24, "cpu": 2 ** 20}   # parameters at a time: temporaries fit a CPU's caches
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}          # bf16, dense, SXM cards


def new_optimizer(model, s, passes=1):
    """AdamW for a model under the Settings s, with weight decay on matrices only.

    The learning rate is set at each step. passes: how many backward passes make up a gradient.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    if s.lean:
        return RoundingAdamW(groups, betas=(0.9, s.beta2), eps=s.eps, sums=passes > 1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, s.beta2), eps=s.eps, fused=True)
    optimizer.state.update((p, new_moments(p, p.device)) for p in matrices + vectors)
    return optimizer


def new_moments(p, device=None):
    """AdamW's state before the first step: there from the start, so that a saved one fits in."""
    return {"step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p)}


def states(model, optimizer):
    """Everything that a step changes, by name: views of the weights and the moments."""
    named = dict(model.named_parameters())
    moments = {key: {name: optimizer.state[p][key].detach() for name, p in named.items()}
               for key in ("exp_avg", "exp_avg_sq")}
    return {"weights": {name: p.detach() for name, p in named.items()}, **moments}


def recompute_layers(model):
    """Make each layer keep only its input: the backward pass computes the rest again.

    Call it before FSDP2 shards the model, so that its hooks stay outside.
    """
    for layer in model.layers:
        # a proxy: the layer itself would be a reference cycle, which keeps its weights alive
        forward = partial(type(layer).forward, weakref.proxy(layer))
        layer.forward = partial(checkpoint, forward, use_reentrant=False)


def compile_parts(model, backend="inductor"):
    """Compile what lies between the matrix products of each layer: MLPs and norms.

    `part.compile()` would keep a bound method in the part, a reference cycle that keeps its weights
    alive. What is compiled here is the class's function, once for all layers, and a part reaches
    itself through a weak reference.
    """
    compiled = {}
    for layer in model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            forward = type(part).forward
            if forward not in compiled:
                compiled[forward] = torch.compile(forward, backend=backend)
            part.forward = partial(call_on, weakref.ref(part), compiled[forward])


def ready(model, s, device, recompute):
    """The model on its device, or its share where there are several ranks, ready to train.

    recompute: keep only the layers' inputs for the backward pass. On a GPU, what lies between the
    matrix products is compiled.
    """
    if recompute:
        recompute_layers(model)
    model = model.to(device) if rank_count() == 1 else share_out(model, s.dtype, device)
    if next(model.parameters()).is_cuda:
        compile_parts(model)
    return model


def call_on(reference, function, *inputs):
    """function of what the weak reference refers to, and the inputs."""
    return function(reference(), *inputs)


def before_training():
    """Import what PyTorch imports in the first step, before a model is there.

    Such an import keeps frames alive until the garbage collector comes, and with them the model.
    """
    import torch._dynamo  # noqa: F401


def release():
    """Free what is left of a phase, for the next one. Its model is gone by then, on one rank.

    What FSDP2 and a first compilation leave in reference cycles goes here.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------ AdamW in bf16

def round_stochastically(x, bits):
    """fp32 to bf16, up or down with such probabilities that the mean is x.

    bits: int32, in each 16 random low bits.
    """
    return (x.view(torch.int32) + (bits & 0xFFFF) & -0x10000).view(torch.float32).bfloat16()


def adamw(w, grad, m, v, bits, numbers):
    """AdamW on flat bf16 tensors, in place, computed in fp32. bits: int32 noise.

    The moments are rounded stochastically too: 1 - beta2 of a change may be less than bf16 can
    show, and would be lost.
    """
    clip, decay, rate, beta1, beta2, correction, eps = numbers.unbind()
    grad = grad.float() * clip
    mean = torch.lerp(grad, m.float(), beta1)
    square = torch.lerp(grad * grad, v.float(), beta2)
    updated = w.float() * decay - rate * mean / ((square * correction).sqrt() + eps)
    w.copy_(round_stochastically(updated, bits))
    m.copy_(round_stochastically(mean, bits >> 16))
    v.copy_(round_stochastically(square, bits >> 16))


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights with bf16 moments.

    At a learning rate of 3e-5 nearly every update is less than half of what a bf16 weight can show.
    So updates are rounded stochastically, with noise from PyTorch's generator.

    sums: the gradients of several backward passes add up in fp32, since a bf16 sum would lose the
    later ones. Each is added as soon as it exists, and freed. (An update within the backward pass
    would need no gradients at all, but clipping needs their norm first.)
    """

    def __init__(self, groups, betas, eps, sums):
        super().__init__(groups, dict(lr=0.0, betas=betas, eps=eps))
        self.sums, self.factor = {}, None
        for p in self.parameters():
            self.state[p] = new_moments(p)
            if sums:
                self.sums[p] = torch.zeros_like(local(p), dtype=torch.float32)
                total = weakref.ref(self.sums[p])       # so that the sums go with the optimizer
                p.register_post_accumulate_grad_hook(partial(add_gradient, total))
        self.update = torch.compile(adamw) if p.is_cuda else adamw

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def gradient(self, p):
        return self.sums[p] if self.sums else local(p.grad)

    def zero_grad(self):
        super().zero_grad()
        for total in self.sums.values():
            total.zero_()

    def clip(self, largest):
        """The norm of the whole gradient, a scalar; the next step scales it down to `largest`."""
        norms = [torch.linalg.vector_norm(self.gradient(p), dtype=torch.float32)
                 for p in self.parameters()]
        norm = over_ranks(torch.stack(norms).square().sum()).sqrt()
        self.factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self):
        """Update the weights. `clip` comes first."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] += 1
                numbers = self.numbers(group, state["step"].item(), p.device)
                flat = (local(x).view(-1).split(CHUNK["cuda" if p.is_cuda else "cpu"])
                        for x in (p, self.gradient(p), state["exp_avg"], state["exp_avg_sq"]))
                for w, grad, m, v in zip(*flat, strict=True):
                    bits = torch.empty_like(w, dtype=torch.int32).random_(-2 ** 31, 2 ** 31)
                    self.update(w, grad, m, v, bits, numbers)

    def numbers(self, group, n, device):
        """What `adamw` needs in step n, as a tensor, so that another step compiles nothing anew."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        numbers = [1 - lr * group["weight_decay"], lr / (1 - beta1 ** n), beta1, beta2,
                   1 / (1 - beta2 ** n), group["eps"]]
        return torch.cat([self.factor.view(1), torch.tensor(numbers).to(device, non_blocking=True)])


def add_gradient(reference, p):
    """Move p's gradient into the sum that a weak reference refers to, unless that is gone."""
    if (total := reference()) is not None:
        total += local(p.grad)
        p.grad = None


# --------------------------------------------------------------------------------- the memory plan

def memory_plan(config, s, ranks=1, recompute=True):
    """What a run needs on each GPU: bytes by name.

    Counted where a tensor stays, estimated where it comes and goes. recompute: whether layers keep
    only their input for the backward pass; in fp32 they always keep everything.
    """
    with torch.device("meta"):
        model = Transformer(config)
    size = lambda module: sum(p.numel() for p in module.parameters())
    taught, recompute = s.distill > 0, recompute and s.lean
    n, layer, width = size(model), size(model.layers[0]), s.dtype.itemsize
    ends = n - config.n_layer * layer                    # embedding, output matrix, last norm
    sequences = s.micro_batch or s.batch // ranks
    tokens = sequences * s.context
    summed = s.lean and sequences * ranks < s.batch
    # of one layer: what its forward pass keeps, and both passes at their peak
    heads, square = config.head_dim * config.n_head, 0
    if not s.lean:
        square = 4 * sequences * config.n_head * s.context ** 2 * width     # masks and scores
    whole = tokens * width * (18 * heads + 4 * config.ffn_dim) + square
    within = tokens * width * (22 * heads + 6 * config.ffn_dim) + square
    logits = 14 * tokens * config.vocab_size
    if s.lean or taught:        # of 2,048 tokens: they and their gradient, some twice, a teacher's
        logits = (5 + taught) * width * min(tokens, 2048) * config.vocab_size + 20 * BLOCK["cuda"]
    logits += config.vocab_size * config.dim * width * summed       # a gradient to be summed
    gathered = 2 * (2 * layer + ends) * width if ranks > 1 else 0
    inputs = tokens * config.dim * width
    kept, more = (inputs, within) if recompute else (whole, within - whole)     # of a layer
    return {"weights": n * width // ranks,
            "gradients": n * (4 if summed else width) // ranks,
            "moments": 2 * n * width // ranks,
            "teacher": n * width // ranks * taught,
            "kept activations": config.n_layer * kept,
            "work": max(more + layer * width * summed, logits) + gathered,
            # CUDA itself, and what falls between the blocks
            "reserve": 2 * 10 ** 9 * torch.cuda.is_available()}


def checked_memory(plan, free):
    """The plan in words. Raises InputError where it exceeds what is free (bytes, or None)."""
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.items() if size)
    total = sum(plan.values())
    of = f" of {free / 1e9:.1f}" if free else ""
    if free and total > free:
        raise InputError(
            f"the run needs {total / 1e9:.1f} GB on each card ({parts}) and {free / 1e9:.1f} are "
            "free; lower --micro-batch or --context, take --precision bf16, or use more cards "
            "with torchrun.")
    return f"{total / 1e9:.1f}{of} GB: {parts}"


def fitted(config, s, memory=None, ranks=1):
    """Whether layers are to keep only their input (recompute_layers), and the plan in words.

    memory: bytes that each card may hold; None: what is free. In bf16 only the input is kept,
    unless everything fits with room to spare. The ranks agree. Results are the same bit for bit,
    since noise is drawn again as it was. Raises InputError as checked_memory does.
    """
    memory = memory or free_memory(device_of_this_process())
    plan = partial(memory_plan, config, s, ranks)
    scarce = s.lean and (memory is None or sum(plan(recompute=False).values()) > ROOM * memory)
    recompute = over_ranks(torch.tensor(float(scarce))).item() > 0
    return recompute, checked_memory(plan(recompute), memory)


# ---------------------------------------------------------------------------------- speed and peaks

def parameter_count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def flops_per_token(config, context):
    """FLOPs of a training step per token: 6 for each parameter, and those of causal attention."""
    attention = 6 * config.n_layer * config.n_head * config.head_dim * context
    return 6 * parameter_count(config) + attention


def flops_share(per_second):
    """MFU: FLOPs per second as a share of the card's peak; None where that is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    shares = (round(per_second / peak, 3) for card, peak in PEAK_FLOPS.items() if card in name)
    return next(shares, None)


def peak_memory():
    """The most bytes that tensors took on the card; without a card, that this process took."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
