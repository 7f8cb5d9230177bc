"""Properties of nanodmc/losses.py, against sums made token by token in fp64."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanodmc import losses
from nanodmc.losses import language_loss, taught_loss
from test_dmc import seeds

shares = st.integers(0, 8).map(lambda eighths: eighths / 8)
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


@given(seeds, sizes, st.integers(1, 30), shares)
def test_losses_are_the_literal_sums(seed, size, chunk, share):
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
    assert loss.item() == pytest.approx(nats / tokens, rel=1e-9)
    taught = taught_loss(head, targets, hidden, other, given_hidden, share, chunk)
    assert [x.item() for x in taught] == pytest.approx(
        [((1 - share) * nats + share * kl) / tokens, nats / tokens, kl / tokens], rel=1e-9)


@given(seeds, sizes, st.integers(1, 30), shares, st.integers(1, 40))
def test_gradients_are_those_of_the_formulas(seed, size, chunk, share, block):
    """For any chunks, and any blocks within them. The teacher has none."""
    (head, other), (hidden, given_hidden), targets = drawn(seed, *size)
    inputs = [hidden.requires_grad_(), head.weight, given_hidden.requires_grad_(), other.weight]
    q, p = head(hidden).log_softmax(-1), other(given_hidden).log_softmax(-1).detach()
    nats = -q.gather(2, targets[..., None]).mean()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    with mock.patch.dict(losses.BLOCK, cpu=block):
        for ours, literal in (
                (language_loss(head, targets, hidden, chunk), nats),
                (taught_loss(head, targets, hidden, other, given_hidden, share, chunk)[0],
                 (1 - share) * nats + share * kl)):
            *found, none, nothing = torch.autograd.grad(3 * ours, inputs, allow_unused=True)
            expected = torch.autograd.grad(3 * literal, inputs[:2], retain_graph=True)
            assert none is nothing is None
            for a, b in zip(found, expected, strict=True):
                assert b.abs().sum() > 0 and torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@given(seeds, sizes)
def test_a_model_does_not_diverge_from_itself(seed, size):
    (head, _), (hidden, _), targets = drawn(seed, *size)
    loss = taught_loss(head, targets, hidden.requires_grad_(), head, hidden, 1.0)[0]
    assert abs(loss.item()) < 1e-12
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-12


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
                 lambda: taught_loss(head, targets, hidden, other, given_hidden, 0.5, 100)[0]):
        with Largest() as largest:
            loss().backward()
        assert largest.size == 100 * 501
