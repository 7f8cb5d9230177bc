"""attend of dmc_fast, through stock flash attention: gradients, precision, kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import dmc
from nanodmc import flash_attention
from nanodmc.launch import INTERPRETED
from test_dmc import (
    assert_as_good,
    config_of,
    groups,
    kernels,
    on_cpu,
    poisoned,  # noqa: F401
    qkv,
    seeds,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("one_thread")       # faster for tiny tensors


def attend_inputs(seed, heads, T, hard, silent, D=8):
    """q, k, v, keep in fp64. hard: alpha in {0, 1}; silent: the control channels are 0."""
    q, k, v, alpha, omega = qkv(seed, heads, T, D=D)
    if silent:
        q[..., 0] = k[..., 0] = 0
    alpha = alpha if hard else omega.clamp(max=0.999)
    return q, k, v, torch.log1p(-alpha * (torch.arange(T) > 0))


def check_attend(heads, T, hard, dtype, D, device="cpu", turns=False):
    """attend against dmc.attend, from the same numbers, in `dtype` and in fp64.

    turns: it rotates queries and keys, whose control channels have any values then.

    q, k, v are views of (B, T, heads, D), as the projections leave them; keep is in fp32, as in
    the model. keep's gradient arrives in a channel of k, with no more than k's precision.
    """
    *inputs, keep = (x.to(device) for x in attend_inputs(0, heads, T, hard, not turns, D=D))
    angles = dmc.rotary_table(config_of(head_dim=D), T, device) if turns else None
    inputs = [x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]

    def run(f, dtype, wide):
        mine = [*(x.to(dtype) for x in inputs), keep.float().to(wide)]
        *rest, dkeep = with_gradients(lambda *x: f(*x, angles), mine, None)
        return [*rest, dkeep.to(dtype)]
    assert_as_good(run(flash_attention.attend, dtype, torch.float32),
                   run(dmc.attend, dtype, torch.float32),
                   run(dmc.attend, torch.float64, torch.float64))


@on_cpu
@given(seeds, groups, st.sampled_from([1, 2, 3, 17, 70]), *[st.booleans()] * 3)
def test_attend_and_its_gradients(seed, heads, T, hard, silent, turns):
    inputs = attend_inputs(seed, heads, T, hard, silent)
    angles = dmc.rotary_table(config_of(head_dim=8), T) if turns else None
    results = [with_gradients(lambda *x, f=f: f(*x, angles), inputs, torch.float64)
               for f in (flash_attention.attend, dmc.attend)]
    for fast, exact in zip(*results, strict=True):
        assert (fast - exact).abs().max() < 1e-12


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,hard", [((4, 4), True), ((4, 4), False), ((8, 2), False)])
def test_attend_is_as_precise_as_the_plain_computation(dtype, heads, hard):
    check_attend(heads, 130, hard, dtype, 64)


@kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("heads,T,hard,D,turns", [
    ((2, 2), 1, True, 8, False), ((3, 1), 2, False, 8, True), ((8, 2), 33, True, 20, True),
    ((8, 1), 40, False, 16, False), ((2, 2), 65, False, 64, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_kernels(heads, T, hard, D, turns, dtype):
    check_attend(heads, T, hard, dtype, D, turns=turns)


@on_cpu
@pytest.mark.parametrize("kind", ["flash", "cudnn"])
def test_stock_kernels_of_a_gpu_take_what_they_are_given(kind):
    """Without a GPU: the arguments fit PyTorch's CUDA operators, and the results have the shapes
    that the CPU's have."""
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.zeros(2, n, 16, 64, device="cuda", dtype=torch.bfloat16)
                   for n in (8, 2, 2))
        y, lse, tensors, sizes = flash_attention.flash(kind, q, k, v, 0.125)
        grads = flash_attention.flash_backward(kind, y, q, k, v, y, lse, tensors, sizes, 0.125)
    assert lse.shape == (2, 8, 16) and lse.dtype == torch.float32
    for result, like in zip((y, *grads), (q, q, k, v), strict=True):
        assert result.shape == like.shape and result.dtype == like.dtype


class Calls(TorchDispatchMode):
    """The operators called, by name, with their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name.removeprefix("aten::")] = args
        return func(*args, **kwargs or {})


def found(x, index):
    """x, cut by all of an index but its tensors, and these tensors by dimension."""
    aten, index = torch.ops.aten, index if isinstance(index, tuple) else (index,)
    if Ellipsis in [i if i is Ellipsis else 0 for i in index]:
        at = [i is Ellipsis for i in index].index(True)
        rest = x.dim() - sum(i is not None for i in index) + 1
        index = (*index[:at], *[slice(None)] * rest, *index[at + 1:])
    places = []
    for i in index:
        if i is None:
            x = aten.unsqueeze(x, len(places))
        elif isinstance(i, slice):
            x = aten.slice(x, len(places), i.start, i.stop, i.step or 1)
        elif not isinstance(i, torch.Tensor):
            x = aten.select(x, len(places), i)
            continue
        places.append(i if isinstance(i, torch.Tensor) else None)
    return x, places if any(i is not None for i in places) else None


@pytest.fixture
def fake_gpu(monkeypatch):
    """CUDA tensors without CUDA: what PyTorch would ask a real GPU for is done by operators."""
    aten, to = torch.ops.aten, torch.Tensor.to

    def get(x, index):
        x, places = found(x, index)
        return aten.index(x, places) if places else x

    def assign(x, index, value):
        x, places = found(x, index)
        if places:
            aten.index_put_(x, places, value)
        elif isinstance(value, torch.Tensor):
            aten.copy_(x, value)
        else:
            aten.fill_(x, value)

    def moved(x, *args, **kwargs):
        if args and isinstance(args[0], torch.device) and args[0] != x.device:
            return aten._to_copy(x, device=args[0], non_blocking=kwargs.get("non_blocking", False))
        return to(x, *args, **kwargs)
    for name, f in (("__getitem__", get), ("__setitem__", assign), ("to", moved),
                    ("copy_", lambda x, y: aten.copy_(x, y)),
                    ("__invert__", lambda x: aten.bitwise_not(x))):
        monkeypatch.setattr(torch.Tensor, name, f)
    with FakeTensorMode():
        yield


@pytest.fixture
def prefers(monkeypatch, fake_gpu):
    """A way to say which attention PyTorch chooses on a GPU, and whether flash could do it."""
    def set_choice(backend, flash=True):
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: backend.value)
        monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: flash)
    return set_choice


def on_fake_gpu(D=64, requires_grad=False):
    return [torch.zeros(2, n, 16, D, device="cuda", dtype=torch.bfloat16,
                        requires_grad=requires_grad) for n in (8, 2, 2)]


@on_cpu
@pytest.mark.parametrize("D", [20, 60, 100, 124, 128])
def test_stock_flash_attention_is_taken_for_head_sizes_that_it_takes(prefers, D):
    """PyTorch would pad the others; its operators do not."""
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        prefers(backend)
        assert (flash_attention.stock(*on_fake_gpu(D)) is None) == (D % 8 > 0)
    prefers(SDPBackend.MATH)
    assert flash_attention.stock(*on_fake_gpu(D)) is None


@on_cpu
@pytest.mark.parametrize("keep", [False, True])
def test_a_prompt_goes_through_flash_rather_than_cudnn(monkeypatch, prefers, keep):
    """cuDNN would make a plan for each new length. Training has one length, and keeps cuDNN."""
    monkeypatch.setattr(flash_attention, "in_kernels", lambda _: False)

    def called(flash):
        prefers(SDPBackend.CUDNN_ATTENTION, flash)
        q, k, v = on_fake_gpu()
        with Calls() as calls:
            decided = torch.zeros(2, 2, 16, device="cuda") if keep else None
            flash_attention.attend(q, k, v, decided)
        return {name for name in calls.seen if "attention" in name}
    assert called(flash=True) == {"_scaled_dot_product_flash_attention"}
    assert called(flash=False) == {"_scaled_dot_product_cudnn_attention"}
    prefers(SDPBackend.CUDNN_ATTENTION)
    assert flash_attention.stock(*on_fake_gpu(requires_grad=True)) == "cudnn"
    with torch.no_grad():
        assert flash_attention.stock(*on_fake_gpu(requires_grad=True)) == "flash"


@on_cpu
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3)])
def test_cudnn_gets_a_gradient_with_the_strides_of_the_output(fake_gpu, order):
    with torch.no_grad(), Calls() as calls:
        q, k, v = on_fake_gpu()
        y, lse, tensors, sizes = flash_attention.flash("cudnn", q, k, v, 0.125)
        grad = torch.zeros([y.size(i) for i in order], device="cuda", dtype=y.dtype)
        grad = grad.permute([order.index(i) for i in range(4)])
        flash_attention.flash_backward("cudnn", grad, q, k, v, y, lse, tensors, sizes, 0.125)
    given, _, _, _, out = calls.seen["_scaled_dot_product_cudnn_attention_backward"][:5]
    assert given.shape == y.shape and given.stride() == out.stride() == y.stride()


@on_cpu
def test_attend_without_decisions_is_plain():
    q, k, v = qkv(0, (8, 2), 9)[:3]
    assert torch.equal(flash_attention.attend(q, k, v), dmc.attend(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1e3, 3e3, 1e4, 1e5, 1e7])
def test_large_scores_never_reach_what_was_overwritten_kernel(size, dtype):
    """Nor in a batch where another sequence has small ones. As good as dmc.attend, but for the
    rounding of one score, which the log-sum-exp has."""
    heads, T = ((2, 1), 20) if INTERPRETED else ((8, 2), 40)
    for seed in range(1 if INTERPRETED else 5):
        q, k, v, keep = attend_inputs(seed, heads, T, hard=True, silent=True)
        scores = q[0].unflatten(0, (heads[1], -1)) @ k[0, :, None].mT / 8 ** 0.5
        q[0] *= size / scores.abs().max()
        inputs, results = [x.to(dtype) for x in (q, k, v)], []
        for f, exact in ((flash_attention.attend, False), (dmc.attend, False), (dmc.attend, True)):
            wide = torch.float64 if exact else torch.promote_types(dtype, torch.float32)
            attend = lambda *x, f=f, keep=keep, wide=wide: f(*x, keep.to(wide))
            results.append(with_gradients(attend, inputs, torch.float64 if exact else dtype))
        rounding = size * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        for x, plain, exact in zip(*results, strict=True):
            error, allowed = ((y.double() - exact).abs().max() for y in (x, plain))
            allowed = allowed + (rounding + torch.finfo(dtype).eps) * exact.abs().max().clamp(min=1)
            assert x.isfinite().all() and error <= 4 * allowed


@on_cpu
def test_scores_that_are_not_numbers_stay_in_their_sequence():
    q, k, v, keep = (x.float() for x in attend_inputs(0, (4, 2), 9, hard=True, silent=True))
    expected = flash_attention.attend(q, k, v, keep)
    for x, bad in ((q, torch.nan), (k, torch.inf), (v, torch.nan), (k, 1e30)):
        poison = [y.clone() for y in (q, k, v)]
        for y, mine in zip(poison, (q, k, v), strict=True):
            if mine is x:
                y[1, :, 3, 5] = bad
        assert torch.equal(flash_attention.attend(*poison, keep)[0], expected[0])
