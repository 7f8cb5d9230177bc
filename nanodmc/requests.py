"""What is asked of the engine, and what it answers."""

from dataclasses import dataclass, field

from nanodmc.files import InputError
from nanodmc.launch import power_of_2

EMPTY = "the prompt is empty; give at least one character."


@dataclass
class Request:
    """A text to continue, and how to sample.

    prompt: ids. count: how many tokens at most; None: 256, or fewer where positions end. key:
    anything that tells its result from those of others.
    """
    prompt: list
    count: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    key: object = None


@dataclass
class Result:
    """What became of a request: a text, or an error, which is a sentence.

    ids: the tokens generated. finish: why they end, "stop" or "length". cr: that of its cache.
    """
    request: Request
    ids: list = field(default_factory=list)
    finish: str | None = None
    cr: float | None = None
    error: str | None = None


def checked_count(config, prompt, count):
    """How many tokens are to follow the prompt. Raises InputError where positions run out."""
    if not prompt:
        raise InputError(EMPTY)
    more = f" and {count} more" if count else ""
    count = count or min(256, config.max_seq_len - len(prompt))
    if len(prompt) + count > config.max_seq_len or count < 1:
        raise InputError(
            f"a prompt of {len(prompt)} tokens{more} does not fit the model's "
            f"{config.max_seq_len} positions; shorten the prompt or generate fewer tokens.")
    return count


def limits_of(requests):
    """The limits of `sample` for these requests, None where all take the likeliest token.

    The first is rounded up to a power of 2, so that there are few of them: each has its own graph.
    """
    drawn = [r for r in requests if r.temperature > 0]
    most = max([r.top_k for r in drawn], default=0)
    return (power_of_2(most) if most else 0, any(r.top_p < 1 for r in drawn)) if drawn else None
