"""Properties of nanodmc/losses.py, against sums made token by token in fp64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanodmc.losses import language_loss, taught_losses
from test_dmc import seeds

sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 7))


def drawn(seed, B, T, vocab, dims=(3, 5)):
    """Heads (model's, teacher's), their hidden states, targets; logits vary by several nats."""
    torch.manual_seed(seed)
    heads = [nn.Linear(dim, vocab, bias=False).double() for dim in dims]
    hidden = [3 * torch.randn(B, T, dim, dtype=torch.float64) for dim in dims]
    return heads, hidden, torch.randint(vocab, (B, T))


def expected_next(head, x):
    """The probabilities of one token's successors, as a list."""
    powers = [math.exp(logit) for logit in head(x).tolist()]
    return [power / sum(powers) for power in powers]


@given(seeds, sizes, st.integers(1, 30))
def test_losses_are_the_literal_sums(seed, size, chunk):
    (head, other), (hidden, given_hidden), targets = drawn(seed, *size)
    nats = kl = 0.0
    for b in range(size[0]):
        for t in range(size[1]):
            ours = expected_next(head, hidden[b, t])
            theirs = expected_next(other, given_hidden[b, t])
            nats -= math.log(ours[targets[b, t]])
            kl += sum(p * (math.log(p) - math.log(q))
                      for p, q in zip(theirs, ours, strict=True))
    tokens = size[0] * size[1]
    loss = language_loss(head, targets, hidden, chunk)
    assert loss.item() == pytest.approx(nats / tokens, abs=1e-5)      # logits are made fp32
    both = taught_losses(head, targets, hidden, other, given_hidden, chunk)
    assert both.tolist() == pytest.approx([nats / tokens, kl / tokens], abs=1e-5)


@given(seeds, sizes, st.integers(1, 30))
def test_chunks_change_no_gradient_and_the_teacher_has_none(seed, size, chunk):
    (head, other), (hidden, given_hidden), targets = drawn(seed, *size)
    inputs = [hidden.requires_grad_(), given_hidden.requires_grad_(), head.weight, other.weight]
    for loss in (lambda n: language_loss(head, targets, hidden, n),
                 lambda n: taught_losses(head, targets, hidden, other, given_hidden, n)[0],
                 lambda n: taught_losses(head, targets, hidden, other, given_hidden, n)[1]):
        whole, cut = (torch.autograd.grad(loss(n), inputs, allow_unused=True)
                      for n in (10 ** 6, chunk))
        assert whole[1] is whole[3] is cut[1] is cut[3] is None
        for a, b in ((whole[0], cut[0]), (whole[2], cut[2])):
            assert a.abs().sum() > 0 and torch.allclose(a, b, atol=1e-6)


@given(seeds, sizes)
def test_a_model_does_not_diverge_from_itself(seed, size):
    (head, _), (hidden, _), targets = drawn(seed, *size)
    loss = taught_losses(head, targets, hidden.requires_grad_(), head, hidden)[1]
    assert abs(loss.item()) < 1e-6
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-6


def test_logits_of_all_tokens_never_exist_at_once():
    """The largest tensor that a step of 1,000 tokens makes is a chunk's logits."""
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if torch.is_tensor(x):
                    self.size = max(self.size, x.numel())
            return out

    (head, other), (hidden, given_hidden), targets = drawn(0, 4, 250, 501)
    for loss in (lambda: language_loss(head, targets, hidden, 100),
                 lambda: taught_losses(head, targets, hidden, other, given_hidden, 100).sum()):
        with Largest() as largest:
            loss().backward()
        assert largest.size == 100 * 501
