"""What a model is trained on, in nats per token: the next token, and what a teacher expects."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def language_loss(head, targets, hidden, chunk=2048):
    """Mean cross-entropy of the next tokens. hidden (B, T, dim), targets (B, T); head: lm_head.

    The logits of `chunk` tokens are made at a time, and made again for the gradient, so that all of
    them never exist at once.
    """
    part = lambda y, x: F.cross_entropy(head(x).float(), y, reduction="sum")
    return in_chunks(part, chunk, targets, hidden)


def taught_losses(head, targets, hidden, teacher_head, teacher_hidden, chunk=2048):
    """`language_loss`, and the mean over the tokens of KL(teacher || model): a tensor (2,).

    teacher_hidden (B, T, its dim): of the same inputs, without gradient. teacher_head makes the
    teacher's logits of them, in the same chunks.
    """
    def part(y, x, given):
        with torch.no_grad():
            expected = teacher_head(given).float().log_softmax(-1)
        ours = head(x).float().log_softmax(-1)
        return torch.stack([F.nll_loss(ours, y, reduction="sum"),
                            F.kl_div(ours, expected, reduction="sum", log_target=True)])
    return in_chunks(part, chunk, targets, hidden, teacher_hidden.detach())


def in_chunks(part, chunk, *inputs):
    """The mean over all tokens of part(...), which sums over those it is given.

    inputs (B, T, ...), of which part is given `chunk` tokens at a time, in one row.
    """
    rows = [x.flatten(0, 1) for x in inputs]
    sums = [checkpoint(part, *some, use_reentrant=False, preserve_rng_state=False)
            for some in zip(*(x.split(chunk) for x in rows), strict=True)]
    return torch.stack(sums).sum(0) / len(rows[0])
