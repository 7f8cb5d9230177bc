"""What a model is trained on, in nats per token: the next token, and what a teacher expects."""

import torch
from torch.utils.checkpoint import checkpoint

from dmc import wide

BLOCK = {"cuda": 2 ** 23, "cpu": 2 ** 19}       # logits in full precision at a time


def language_loss(head, targets, hidden, chunk=2048):
    """Mean cross-entropy of the next tokens. hidden (B, T, dim), targets (B, T); head: lm_head.

    The logits of `chunk` tokens are made at a time, and again for the gradient where there are more
    tokens, so that all of them never exist at once.
    """
    part = lambda y, x: Objective.apply(head(x), y, None, 0.0)
    return in_chunks(part, chunk, targets, hidden)[0]


def taught_loss(head, targets, hidden, teacher_head, teacher_hidden, share, chunk=2048):
    """share * KL(teacher || model) + (1 - share) * `language_loss`, means over the tokens.

    teacher_hidden (B, T, its dim): of the same inputs. teacher_head makes the teacher's logits of
    them, in the same chunks. Returns the sum, and without gradient its parts, LM loss and KL.
    """
    def part(y, x, given):
        with torch.no_grad():
            expected = teacher_head(given)
        return Objective.apply(head(x), y, expected, share)

    objective, (lm, kl) = in_chunks(part, chunk, targets, hidden, teacher_hidden.detach())
    return objective, lm, kl


def in_chunks(part, chunk, *inputs):
    """The means over all tokens of what part(...) returns, sums over those it is given.

    inputs (B, T, ...), of which part is given `chunk` tokens at a time, in one row. The backward
    pass begins with the last chunk, so its logits' gradient may wait for it.
    """
    rows = [x.flatten(0, 1) for x in inputs]
    *others, last = zip(*(x.split(chunk) for x in rows), strict=True)
    sums = [checkpoint(part, *some, use_reentrant=False, preserve_rng_state=False)
            for some in others] + [part(*last)]
    return [torch.stack(parts).sum(0) / len(rows[0]) for parts in zip(*sums, strict=True)]


class Objective(torch.autograd.Function):
    """Summed over tokens: share * KL(p || q) - (1 - share) * log q[target], and both parts.

    q is the softmax of the logits (N, vocabulary), p that of a teacher's, or None with share 0.
    The gradient, q - share * p and at the target 1 - share less, comes along with the value, in the
    logits' dtype, so that little in full precision is ever there.
    """

    @staticmethod
    def forward(ctx, logits, targets, teacher, share):
        gradient, sums = torch.empty_like(logits), wide(logits.new_zeros(2))
        rows = max(1, BLOCK["cuda" if logits.is_cuda else "cpu"] // logits.size(1))
        for start in range(0, len(logits), rows):
            some = slice(start, start + rows)
            log_q, target = wide(logits[some]).log_softmax(-1), targets[some, None]
            sums[0] -= log_q.gather(1, target).sum()
            difference = log_q.exp()
            if teacher is not None:
                log_p = wide(teacher[some]).log_softmax(-1)
                p = log_p.exp()
                sums[1] += torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
                difference.sub_(p, alpha=share)
            difference.scatter_add_(1, target, torch.full_like(difference[:, :1], share - 1))
            gradient[some] = difference
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return (1 - share) * sums[0] + share * sums[1], sums

    @staticmethod
    def backward(ctx, grad, _):
        gradient, = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None
