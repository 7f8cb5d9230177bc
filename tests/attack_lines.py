"""Input that means harm: lines of prompts, files that run a program, weights that overflow."""

import os
import pickle

import torch

import dmc
from nanodmc import checkpoint
from nanodmc.tokenizer import Tokenizer
from test_dmc import config_of

ODD = ["null", "true", "[]", "{}", '""', '"7"', "NaN", "Infinity", "-Infinity", "-0", "-0.0",
       "1e999", "-1", "0", "0.5", "1e-320", "1e308", str(2 ** 31), str(2 ** 62), str(2 ** 63),
       str(2 ** 64), str(-2 ** 63 - 1), "9" * 400, "9" * 5000, "1." + "9" * 400,
       "[[" * 2000 + "]]" * 2000, '{"a": ' * 900 + "1" + "}" * 900, '"' + "x" * 10_000 + '"',
       '"\\ud800"', '"\\u0000"',
       '"\\u001b]0;x\\u0007"', "[1, 2]", '{"prompt": "x"}', "1_000", "0x10", "\u0661"]
NUMBERS = ["tokens", "temperature", "top_k", "top_p", "seed"]
FIELDS = [*NUMBERS, *NUMBERS, "prompt", "id", "line", "sample", "settings", "text", "error"]
WHOLE = [b"{", b"[]", b"null", b"\xff\xfe{", b"\xef\xbb\xbf{}", bytes(range(11, 256)), b"\x00" * 50,
         b"[" * 100_000, b'{"prompt": ' * 50_000, b'{"prompt": "x"} {"prompt": "y"}', b'{"prompt"}',
         b'{"prompt": "x"', b"\x1b[2J", b'{"prompt": "\xff\xfe"}', b'{"prompt": "' + b"x" * 10 ** 6,
         b'{"prompt": "' + b"x" * 10 ** 6 + b'"}', b"\r", b"\x85", "\u2028".encode(), b"nan"]


def hostile_line(rng):
    """A line of a file of prompts, as bytes, with something odd in it."""
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(WHOLE)
    if kind < 0.3:
        return rng.randbytes(rng.randint(1, 200)).replace(b"\n", b"")
    names = rng.choices(FIELDS, k=rng.choice([1, 1, 1, 2, 4]))       # one alone is read to its end
    fields = [f'"{name}": {rng.choice(ODD)}' for name in names]
    if rng.random() < 0.9:
        fields.insert(0, '"prompt": "3 times"')
    line = ("{" + ", ".join(fields) + "}").encode()
    if kind < 0.4:                                      # a byte of it is another
        at = rng.randrange(len(line))
        line = line[:at] + rng.randbytes(1).replace(b"\n", b" ") + line[at + 1:]
    return line


class Runs:
    """What runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def pickle_that_runs(rng, marker):
    """A pickle that makes the file `marker`, in one of several ways."""
    runs = rng.choice([Runs(os.system, f"touch '{marker}'"), Runs(os.mkdir, str(marker)),
                       Runs(eval, f"open({str(marker)!r}, 'w')"),
                       Runs(exec, f"open({str(marker)!r}, 'w')"), Runs(open, str(marker), "w")])
    return pickle.dumps(rng.choice([runs, {"weight": runs}, [torch.zeros(2), runs]]),
                        protocol=rng.choice([2, 4, 5]))


def save_poisoned(folder, rng, dtype):
    """A model over bytes that turns x, y and z into NaN, infinity, or numbers that overflow."""
    torch.manual_seed(rng.randrange(2 ** 31))
    dtype = getattr(torch, dtype)
    model = dmc.Transformer(config_of((4, 2), vocab_size=257, c=0.0)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(3)
        for letter in "xyz":
            model.embed_tokens.weight[ord(letter)] = rng.choice([
                torch.finfo(dtype).max, -torch.finfo(dtype).max, float("nan"), float("inf")])
            model.embed_tokens.weight[ord(letter), rng.randrange(model.config.dim)] = 0
            model.lm_head.weight[ord(letter)] = 0
    checkpoint.save(model, folder, Tokenizer.bytes())
    return 0
