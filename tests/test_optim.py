"""Properties of nanodmc/optim.py: an update in bf16 is AdamW's on average, and memory is counted.

Also of what training does to save memory: it changes no loss and no gradient.
"""

import math
import os
import types
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import dmc
import dmc_fast
import train
from conftest import LEAN, TINY, curve, refusal, same_weights, single_threaded
from dmc import Config, Transformer
from nanodmc import cli, files, flash_attention, optim
from nanodmc.config import SHAPES
from nanodmc.files import InputError
from nanodmc.losses import language_loss, taught_loss
from nanodmc.phases import Phase, plan
from nanodmc.settings import PRESETS, Settings
from nanodmc.tables import show
from nanodmc.text import batch, standard_library
from test_dmc import assert_close, config_of, groups, model_of, seeds

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny models

# ------------------------------------------------------------------------------ stochastic rounding

@given(st.floats(width=32, allow_subnormal=False, max_value=2.0 ** 127, min_value=-2.0 ** 127))
def test_stochastic_rounding_is_unbiased(x):
    """Over all the noise there is, each value once, the mean is x itself, and nothing but the two
    neighbours of x occurs."""
    bits = torch.arange(2 ** 16, dtype=torch.int32)
    rounded = optim.round_stochastically(torch.full((2 ** 16,), x), bits - 2 ** 20).double()
    assert rounded.mean().item() == x
    assert (rounded - x).abs().max() <= max(abs(x) * 2.0 ** -7, 2.0 ** -133)
    kept = rounded[:1].float()                       # bf16 stays bf16
    assert torch.equal(optim.round_stochastically(kept, bits[-1:]).float(), kept)


def test_stochastic_rounding_keeps_what_is_no_number():
    x = torch.tensor([math.inf, -math.inf, math.nan])
    rounded = optim.round_stochastically(x, torch.full((3,), -1, dtype=torch.int32))
    assert rounded[0] == math.inf and rounded[1] == -math.inf and rounded[2].isnan()


def steps_of_adamw(model, gradients, **changes):
    optimizer = optim.new_optimizer(model, Settings(clip=0.5, **changes))
    for gradient in gradients:
        optimizer.zero_grad()
        for p, g in zip(model.parameters(), gradient, strict=True):
            p.grad = g.to(p.dtype).contiguous()
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        if changes.get("precision") == "bf16":
            optimizer.clip(0.5)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return optimizer


def test_rounding_adamw_is_adamw_on_average(monkeypatch):
    """Three steps, many times over: the mean of weights and moments is what fp64 AdamW makes of the
    same gradients."""
    monkeypatch.setitem(optim.CHUNK, "cpu", 1000)          # cuts through the copies
    copies, size = 4096, 7                                           # sqrt(4096) is exact in bf16
    torch.manual_seed(0)
    start, gradients = torch.randn(size).bfloat16(), torch.randn(3, 1, size).bfloat16()
    exact = torch.nn.Linear(size, 1, bias=False).double()
    many = torch.nn.Linear(size, copies, bias=False).bfloat16()
    with torch.no_grad():
        exact.weight.copy_(start[None])
        many.weight.copy_(start.expand(copies, size))
    moments = steps_of_adamw(exact, gradients[:, None], weight_decay=0.5, beta2=0.9)
    moments = moments.state[exact.weight]
    shrunk = gradients * copies ** -0.5              # the norm is the same, and so is the clipping
    state = steps_of_adamw(many, shrunk.expand(3, copies, size)[:, None], precision="bf16",
                           weight_decay=0.5, beta2=0.9, eps=1e-8 * copies ** -0.5)
    state = state.state[many.weight]
    scale = copies ** 0.5
    for ours, theirs, unit in (
            (many.weight, exact.weight, 1.0), (state["exp_avg"], moments["exp_avg"], scale),
            (state["exp_avg_sq"], moments["exp_avg_sq"], copies)):
        ours, theirs = ours.detach().double() * unit, theirs.detach()[0]
        error = (ours.mean(0) - theirs).abs()
        assert (ours.std(0) > 0).any()
        assert (error < 5 * ours.std(0) / scale + 1e-4 * theirs.abs()).all()


def test_gradients_of_many_passes_add_up_in_fp32():
    """Against the exact sum of the passes' bf16 gradients; a bf16 sum, which is what .grad holds,
    is far off."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, bias=False).bfloat16()
    passes = torch.randn(300, 4, 8).bfloat16() + 1
    gradients = [torch.autograd.grad(model(x).sum(), model.weight)[0].double() for x in passes]
    for x in passes:
        model(x).sum().backward()
    rough = model.weight.grad.double()
    optimizer = optim.new_optimizer(model, Settings(precision="bf16"), passes=300)
    optimizer.zero_grad()
    for x in passes:
        model(x).sum().backward()
    exact = sum(gradients)
    error = lambda total: ((total.double() - exact).norm() / exact.norm()).item()
    assert model.weight.grad is None
    assert error(optimizer.gradient(model.weight)) < 1e-6 and error(rough) > 0.01
    assert optimizer.clip(1.0).item() == pytest.approx(exact.norm().item(), rel=1e-5)


# -------------------------------------------------------------------------------- what a step keeps

class Allocated(TorchDispatchMode):
    """Bytes of the tensors that were made under it, without the models' own: those that still live,
    their peak, and the largest one's. It counts tensors without data, on the device meta, too."""

    def __init__(self, *models):
        super().__init__()
        self.storages, self.largest, self.live, self.peak = {}, 0, 0, 0
        self.own = {p.untyped_storage()._cdata for model in models for p in model.parameters()}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.own and storage._cdata not in self.storages:
                    self.largest = max(self.largest, storage.nbytes())
                    self.storages[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def gone(self, key):
        self.live -= self.storages.pop(key)


def lean_loss(model, inputs, targets, teacher=None, **chunk):
    """The loss and the decisions in the way that saves memory."""
    hidden, alpha = model.hidden(inputs, noise=True)
    if teacher is None:
        return language_loss(model.lm_head, targets, hidden, **chunk), alpha
    with torch.no_grad():
        expected, _ = teacher.hidden(inputs)
    both = taught_loss(model.lm_head, targets, hidden, teacher.lm_head, expected, 1.0, **chunk)
    return both[0], alpha


def test_one_activation_per_layer_is_kept_and_no_full_logits():
    kept = []
    tokens = torch.zeros(2, 60, dtype=torch.long)
    for layers in (2, 6):
        config = config_of(n_layer=layers, dim=128, vocab_size=1000)
        model = Transformer(config, dmc_fast).bfloat16()
        optim.recompute_layers(model)
        with single_threaded(), Allocated(model) as allocated:
            loss, alpha = lean_loss(model, tokens, tokens, chunk=40)
            kept.append(allocated.live)
            (loss + alpha.mean()).backward()
        weights, all_logits = 1000 * 128 * 2, 120 * 1000 * 4         # in bf16, in fp32
        assert allocated.largest <= weights < all_logits
    input_of_a_layer, alpha = 2 * 60 * 128 * 2, 2 * 4 * 60 * 4
    assert kept[1] - kept[0] == 4 * (input_of_a_layer + alpha)       # alpha: in the result's stack


@given(seeds, groups, st.sampled_from([1, 7, 64]))
@settings(max_examples=8)
def test_saving_memory_changes_no_loss_and_no_gradient(seed, heads, chunk):
    model, results = model_of(seed, heads), []
    x = torch.randint(0, 29, (2, 14))
    for lean in (False, True):
        torch.manual_seed(seed)
        if lean:
            optim.recompute_layers(model)
            loss, alpha = lean_loss(model, x[:, :-1], x[:, 1:], chunk=chunk)
        else:
            logits, alpha = model(x[:, :-1], noise=True)
            loss = F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())
        total = loss + dmc.compression_loss(alpha, 4)
        results.append([loss, alpha, *torch.autograd.grad(total, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-6 * max(1.0, a.abs().max().item()))


def test_recomputation_keeps_no_model_alive():
    """Its weights go with the last reference to it, without waiting for the garbage collector."""
    model = Transformer(config_of(), dmc_fast)
    optim.recompute_layers(model)
    gone = weakref.ref(model.layers[0])
    logits, _ = model(torch.zeros(1, 5, dtype=torch.long), noise=True)
    logits.sum().backward()
    del model, logits
    assert gone() is None


def test_any_cut_of_a_batch_gives_the_same_step():
    """Without decisions, whose noise depends on the cut."""
    s = Settings(layers=1, heads=2, kv_heads=1, dim=16, ffn_dim=16, context=16, batch=6)
    x = torch.randint(0, 257, (6, 17), generator=torch.Generator().manual_seed(0))
    moved = []
    for size in (6, 2, 1):
        torch.manual_seed(0)
        model = Transformer(s.small_config())
        passes = [(6 // size, part[:, :-1], part[:, 1:]) for part in x.split(size)]
        optimizer = optim.new_optimizer(model, s)
        loss, *_ = train.train_step(model, optimizer, plan(s)[0], 5, passes, s)
        weights = (p.detach().flatten() for p in model.parameters())
        moved.append(torch.cat([torch.tensor([loss]), *weights]))
    assert_close(moved[0], moved[1], 1e-5)
    assert_close(moved[0], moved[2], 1e-5)


# ---------------------------------------------------------------------------------- the memory plan

def test_the_memory_plan_counts_what_stays(tmp_path, text, capsys, monkeypatch):
    for precision, micro_batch in (("fp32", 0), ("bf16", 0), ("bf16", 2)):
        s = Settings(precision=precision, micro_batch=micro_batch)
        model = Transformer(s.small_config()).to(s.dtype)
        optimizer = optim.new_optimizer(model, s, passes=4 if micro_batch else 1)
        for p in model.parameters():
            p.sum().backward()
        if s.lean:
            optimizer.clip(1.0)
        optimizer.step()
        planned = optim.memory_plan(s.small_config(), s)
        moments = sum(entry[key].nbytes for entry in optimizer.state.values()
                      for key in ("exp_avg", "exp_avg_sq"))
        gradients = sum((optimizer.sums[p] if micro_batch else p.grad).nbytes
                        for p in model.parameters())
        assert planned["weights"] == sum(p.nbytes for p in model.parameters())
        assert (planned["gradients"], planned["moments"]) == (gradients, moments)
    monkeypatch.chdir(tmp_path)
    told = refusal(train.main, ["--data", text, *TINY, "--memory", "1e-5"], capsys, tmp_path)
    assert "needs" in told and "weights" in told and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["llama2-7b", "llama2-70b"])
def test_the_memory_plan_fits_a_terminal(name, capsys):
    planned = optim.memory_plan(Config(**SHAPES[name]), Settings(**PRESETS[name]), 8)
    show(optim.checked_memory(planned, 640e9), "memory")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(" ".join(lines).split())
    for part in (f"weights {planned['weights'] / 1e9:.1f}", f"{sum(planned.values()) / 1e9:.1f}",
                 "640.0"):
        assert part in words
    with pytest.raises(InputError, match="--micro-batch"):
        optim.checked_memory(planned, sum(planned.values()) - 1)


class AverageOnMeta(torch.autograd.Function):
    """What the averaging kernels keep and return, without their work."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*(x.contiguous() for x in inputs))
        return tuple(torch.empty_like(x) for x in ctx.to_save[:2])

    @staticmethod
    def backward(ctx, *grads):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


@pytest.mark.parametrize(("distill", "recompute"), [(0.0, True), (1.0, True), (0.0, False)])
def test_the_memory_plan_is_what_a_step_takes(distill, recompute, monkeypatch):
    """Four layers of Llama 2 7B at 4,096 tokens, without data: two passes and the update."""
    ops = types.SimpleNamespace(
        Cache=None, accumulate=lambda k, v, alpha, omega, window: AverageOnMeta.apply(
            k, v, alpha, omega),
        attend=lambda q, k, v, keep=None, angles=None: flash_attention.MaskedFlash.apply(
            q, k, v, torch.zeros_like(k[..., 0]) if keep is None else keep, 0.1, "cpu", angles))
    config = Config(**SHAPES["llama2-7b"] | {"n_layer": 4})
    monkeypatch.setitem(optim.CHUNK, "cpu", optim.CHUNK["cuda"])     # the plan is a GPU's
    s = Settings(**PRESETS["llama2-7b"] | {"distill": distill, "micro_batch": 1})
    with torch.device("meta"):
        model = Transformer(config, ops).bfloat16()
        teacher = Transformer(replace(config, dmc=False), ops).bfloat16() if distill else None
    if recompute:
        optim.recompute_layers(model)
    tokens = torch.zeros(1, 4096, dtype=torch.long, device="meta")
    models = [model, teacher] if distill else [model]
    with Allocated(*models) as allocated:
        optimizer = optim.new_optimizer(model, s, passes=2)
        for _ in range(2):
            loss, alpha = lean_loss(model, tokens, tokens, teacher=teacher)
            (loss + dmc.compression_loss(alpha, 2)).backward()
            del loss, alpha
        optimizer.clip(1.0)
        optimizer.step()
    taken = allocated.peak + sum(p.nbytes for m in models for p in m.parameters())
    planned = sum(optim.memory_plan(config, s, recompute=recompute).values())
    planned -= 2e9 * torch.cuda.is_available()
    print(taken, planned)
    assert taken < planned < 1.05 * taken


def test_layers_keep_what_fits(monkeypatch):
    """Everything where there is room to spare, else their input; in fp32 always everything."""
    s = Settings(precision="bf16")
    config = s.small_config()
    little, much = (sum(optim.memory_plan(config, s, recompute=x).values()) for x in (True, False))
    assert little < much
    assert optim.fitted(config, s, memory=1.4 * much)[0] is False
    assert optim.fitted(config, s, memory=1.2 * much)[0] is True
    assert optim.fitted(config, replace(s, precision="fp32"), memory=1e12)[0] is False
    with pytest.raises(InputError, match="--micro-batch"):
        optim.fitted(config, s, memory=little - 1)
    monkeypatch.setattr(optim, "free_memory", lambda _: None)
    assert optim.fitted(config, s)[0] is True


def test_recomputation_changes_no_bit(tmp_path, text, monkeypatch):
    runs = []
    for room in (optim.ROOM, 0):
        monkeypatch.setattr(optim, "ROOM", room)
        runs.append(tmp_path / str(room))
        assert train.main(["--out", str(runs[-1]), "--data", text, *TINY, *LEAN]) == 0
    assert curve(runs[0]) == curve(runs[1])
    same_weights(*runs)


def test_llama2_7b_fits_one_card():
    planned = optim.memory_plan(Config(**SHAPES["llama2-7b"]), Settings(**PRESETS["llama2-7b"]))
    assert planned["weights"] == 6738415616 * 2
    assert planned["gradients"] == planned["moments"] == 6738415616 * 4
    assert planned["kept activations"] == 32 * 2 * 4096 * 4096 * 2
    assert sum(planned.values()) + 2e9 < 78e9


def test_model_flops(monkeypatch):
    """Of Llama 2 7B at 4,096 tokens: 6 for each of 6.74 billion parameters, and 12 L dim T / 2."""
    config = Config(**SHAPES["llama2-7b"])
    attention = 12 * 32 * 4096 * 4096 // 2
    assert optim.flops_per_token(config, 4096) == 6 * 6738415616 + attention
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert optim.flops_share(0.4 * 989e12) == 0.4


# ------------------------------------------------------------------------------------- against fp32

def memory_path_curves(steps, passes):
    """Losses of a small model's retrofit: in fp32 with three seeds of the noise, and in bf16 with
    each of these numbers of passes a step."""
    tokens = np.concatenate([np.frombuffer(f.read_bytes(), dtype=np.uint8)
                             for f in standard_library()[:40]])
    small = dict(layers=2, heads=4, kv_heads=2, dim=64, ffn_dim=128, context=64, batch=8, lr=3e-3,
                 c=1.0)
    runs = [(f"fp32, noise {i}", i, 0) for i in range(3)]
    runs += [(f"bf16, passes {n}", 0, n) for n in passes]
    curves = {}
    for name, noise, count in runs:
        s = Settings(**small, precision="bf16" if count else "fp32",
                     micro_batch=8 // count if count else 0)
        phase = Phase("retrofit", None, None, steps, 0, 0, s.lr, cr=(1.0, 2.0))
        torch.manual_seed(0)
        config = replace(s.small_config(), **s.method(dmc=True))
        model = Transformer(config, dmc_fast if s.lean else dmc).to(s.dtype)
        if s.lean:
            optim.recompute_layers(model)
        optimizer, curves[name] = optim.new_optimizer(model, s, passes=count), []
        for step in range(steps):
            torch.manual_seed(10_000 * noise + step)
            parts = (x.split(s.micro_batch or 8) for x in batch(tokens, s, step, "cpu"))
            cut = [(count or 1, *part) for part in zip(*parts, strict=True)]
            loss = train.train_step(model, optimizer, phase, step, cut, s)[0]
            curves[name].append(loss)
    return {name: np.array(losses) for name, losses in curves.items()}


def test_the_memory_saving_path_follows_fp32_within_noise():
    """The distance to fp32, over the last half of the run, is no more than what another seed of the
    decisions' noise makes. DMC_STEPS and DMC_RESULTS: as many steps, and a file for the figures."""
    steps = int(os.environ.get("DMC_STEPS", 20))
    with single_threaded():
        curves = memory_path_curves(steps, passes=(1, 2, 8) if steps > 20 else (2,))
    half = {name: losses[steps // 2:] for name, losses in curves.items()}
    off = {name: losses - half["fp32, noise 0"] for name, losses in half.items()}
    if "DMC_STEPS" in os.environ:
        mean = lambda of: {name: float(x.mean()) for name, x in of.items()}
        files.write_json(os.environ["DMC_RESULTS"], {
            "steps": steps, "mean loss of the last half": mean(half),
            "its difference to fp32, noise 0": mean(off),
            "mean absolute difference per step": mean({n: np.abs(x) for n, x in off.items()}),
            "every 10th loss": {name: x[::10].round(4).tolist() for name, x in curves.items()},
            **cli.provenance(),
            "command": f"DMC_STEPS={steps} DMC_RESULTS=results/precision.json "
                       "python -m pytest tests/test_optim.py -k within_noise"})
    assert curves["fp32, noise 0"][0] - half["fp32, noise 0"].mean() > 0.5          # it learns
    noise = max(np.abs(off[f"fp32, noise {i}"]).mean() for i in (1, 2))
    for name in curves:
        assert abs(off[name].mean()) < 2 * noise and np.abs(off[name]).mean() < 2 * noise
