"""Properties of nanodmc/decisions.py: the numbers and the gradients of dmc.decide."""

import gc
import weakref

import pytest
import torch

import dmc
import dmc_fast
from nanodmc import decisions
from nanodmc.optim import recompute_layers
from test_dmc import assert_as_good, config_of, kernels, on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")


def check_decisions(dtype, heads, T, noise, device="cpu"):
    """From the same numbers and the same noise, as good as dmc.decide; q and k are views, and get
    gradients from elsewhere as well. Logits lie on both sides of c, and far from it."""
    config, (H, G) = config_of(heads, c=2.0, tau=0.3), heads
    rng = torch.Generator().manual_seed(T)
    both = torch.randn(2, T, H + G, 8, generator=rng)
    both[..., 0] = 8 * torch.randn(2, T, H + G, generator=rng) * (torch.rand(
        2, T, H + G, generator=rng) < 0.9)
    both[:, :1, 0, 0] = -200                               # beyond the clamp of the importance
    slopes = torch.randn(3, 2, G, T, generator=rng).to(device)

    def run(decide, dtype):
        x = both.to(dtype).requires_grad_()
        q, k = x.transpose(1, 2).split((H, G), dim=1)
        torch.manual_seed(1)
        out = decide(q, k, config, noise)
        along = (q[..., 1:].sum() + k[..., 1:].sum()) / 8
        sum((y * slope).sum() for y, slope in zip(out, slopes, strict=True)).add(along).backward()
        return [*out, x.grad]

    def exact(q, k, config, noise):                        # the noise of fp32 in fp64
        u = torch.rand_like(k[..., 0].float()).clamp_(1e-6, 1 - 1e-6).double()
        x = (k[..., 0] - config.c + noise * torch.logit(u)) / (noise * config.tau)
        x = torch.cat([torch.full_like(x[..., :1], -torch.inf), x[..., 1:]], -1)
        return (x.sigmoid(), torch.nn.functional.logsigmoid(-x),
                dmc.importance(q[..., 0], G))
    both = both.to(device, dtype).double()
    ours, plain = run(decisions.decide, dtype), run(dmc.decide, dtype)
    assert_as_good(ours, plain, run(exact, torch.float64))
    assert (ours[0][..., 0] == 0).all() and (ours[1][..., 0] == 0).all()


@kernels
@pytest.mark.parametrize("noise", [1.0, 0.1])
@pytest.mark.parametrize("heads,T", [((4, 4), 1), ((4, 4), 300), ((8, 2), 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decisions_and_gradients_kernel(dtype, heads, T, noise):
    check_decisions(dtype, heads, T, noise)


@kernels
def test_nothing_is_kept_after_a_backward_pass_kernel():
    """Keys and queries go when nobody needs them, without the help of the garbage collector."""
    x, config = torch.randn(1, 9, 4, 8, requires_grad=True), config_of()
    gc.disable()
    try:
        q, k = (x * 1.0).transpose(1, 2), (x * 2.0).transpose(1, 2)
        alpha, _, omega = decisions.decide(q, k, config, 1.0)
        (alpha.sum() + omega.sum() + q.square().sum() + k.square().sum()).backward()
        left = [weakref.ref(q), weakref.ref(k)]
        del q, k, alpha, omega
        assert [ref() for ref in left] == [None, None]
    finally:
        gc.enable()


@kernels
def test_what_does_not_train_is_plain_kernel():
    """Without noise, without gradient, in fp64, and where a sequence goes on."""
    config, x = config_of(), torch.randn(2, 2, 4, 9, 8)
    q, k = x.clone().requires_grad_().unbind()
    for inputs, how in (((q, k), (0, 0)), (x.unbind(), (1.0, 0)), ((q, k), (1.0, 3)),
                        ((q.double(), k.double()), (1.0, 0))):
        torch.manual_seed(0)
        ours = decisions.decide(*inputs, config, *how)
        torch.manual_seed(0)
        for a, b in zip(ours, dmc.decide(*inputs, config, *how), strict=True):
            assert torch.equal(a, b)


@kernels
def test_a_model_trains_by_them_kernel():
    """All gradients of a Transformer, with dmc.py's and with these; also where layers are
    recomputed."""
    grads = []
    for decide, recompute in ((dmc.decide, False), (decisions.decide, False),
                              (decisions.decide, True)):
        torch.manual_seed(0)
        model = dmc.Transformer(config_of((4, 2), c=0.0), dmc_fast)
        for layer in model.layers:
            layer.self_attn.decide = decide
        if recompute:
            recompute_layers(model)
        torch.manual_seed(1)
        logits, alpha = model(torch.arange(20)[None] % 29, noise=0.7)
        (logits.square().sum() + alpha.sum()).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, ours, again in zip(*grads, strict=True):
        scale = plain.abs().max().item() + 1e-6
        assert (ours - plain).abs().max() < 1e-4 * scale
        assert torch.equal(ours, again)


@on_cpu
def test_without_kernels_it_is_dmc_py():
    q, k = torch.randn(2, 1, 4, 9, 8).requires_grad_().unbind()
    torch.manual_seed(0)
    ours = dmc_fast.decide(q, k, config_of(), 1.0)
    torch.manual_seed(0)
    assert all(map(torch.equal, ours, dmc.decide(q, k, config_of(), 1.0)))
