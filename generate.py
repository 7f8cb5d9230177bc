"""Use a DMC model: generate text, and look at what its heads merged.

    python generate.py                                 the newest run's most compressed model continues a prompt
    python generate.py --ckpt runs/1/cr2 --prompt "import os"
    python generate.py --show-merges 0.0               the prompt, cut into the segments that layer 0, head 0 merged
    python generate.py --cache full                    the same weights, every token kept
"""

import argparse
import codecs
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

import dmc
import dmc_fast
from dmc import Config, InputError, Tokenizer, Transformer, one_line, read_json, weight_files

OPS = {"fast": dmc_fast, "reference": dmc}
PROMPT = "import os\nimport sys\n\ndef "
SEGMENT_COLOURS = ("\033[48;5;24m\033[97m", "\033[48;5;94m\033[97m", "\033[48;5;29m\033[97m")
RESET = "\033[0m"


# ------------------------------------------------------------------------------------------------ finding models

LLAMA2 = dict(vocab_size=32000, max_seq_len=4096, norm_eps=1e-5)
SHAPES = {"llama2-7b": dict(n_layer=32, n_head=32, n_kv_head=32, dim=4096, ffn_dim=11008, **LLAMA2),
          "llama2-13b": dict(n_layer=40, n_head=40, n_kv_head=40, dim=5120, ffn_dim=13824, **LLAMA2),
          "llama2-70b": dict(n_layer=80, n_head=64, n_kv_head=8, dim=8192, ffn_dim=28672, **LLAMA2)}


def random_model(name, ops=None, device=None, dtype=torch.bfloat16, **changes):
    """A Transformer of a known shape ("llama2-7b", ...) with random weights: to measure speed and memory."""
    if name not in SHAPES:
        raise InputError(f"there is no shape {name}; random weights come as {', '.join(SHAPES)}.")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)          # the weights are made in their dtype, never in a larger one
    try:
        with torch.device(device or "cpu"):
            return Transformer(Config(**{**SHAPES[name], "dmc": False, **changes}), ops)
    finally:
        torch.set_default_dtype(before)


def locate(name):
    """The folder of a checkpoint: `name` itself, or for llama2-7b, ... and any org/name its place in Hugging Face's cache.

    A model that is not there is fetched if huggingface_hub is installed. Raises InputError where that is impossible.
    """
    if Path(name).is_dir():
        return Path(name)
    repo = f"meta-llama/{name.replace('llama2', 'Llama-2')}-hf" if name in SHAPES else name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or Path(name).exists():
        raise InputError(f"{name} is no folder, and no model's name; give the folder of a checkpoint, {', '.join(SHAPES)}, "
                         "or org/name.")
    env = os.environ
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")).expanduser()
    cached = Path(env.get("HF_HUB_CACHE") or home / "hub").expanduser() / ("models--" + repo.replace("/", "--"))
    with suppress(OSError, InputError):
        folder = cached / "snapshots" / (cached / "refs/main").read_text().strip()
        weight_files(folder)
        return folder
    wanted = ["*.json", "*.safetensors"]
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"{name} is no folder, and {repo} is not in {cached.parent}; fetch it with: pip install "
                         f"huggingface_hub && hf download {repo} --include {' '.join(map(repr, wanted))}") from None
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:      # its many kinds: no network, no such model, a licence that was not accepted
        raise InputError(f"{repo} could not be fetched ({type(error).__name__}: {one_line(error)}); "
                         "check the name, the network, and for models under a licence hf auth login.") from None


# ------------------------------------------------------------------------------------------------ shared with train.py

def read_lines(path):
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def runs_by_number():
    return sorted((p for p in Path("runs").glob("*") if p.name.isdigit()), key=lambda p: int(p.name))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help.")


def read_text(path, source="--data"):
    """The text in a file that the flag `source` named."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check {source}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; convert it, or leave it out of {source}.") from None


def provenance():
    """What stands behind a figure: command, commit (None outside a clone, or without git), versions, device."""
    commit = None
    if shutil.which("git"):
        git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or None
    cpu = next((line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    return {"date": time.strftime("%Y-%m-%d"), "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": commit, "device": device,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                         "triton": getattr(dmc_fast.triton, "__version__", None)}}


# ------------------------------------------------------------------------------------------------ sampling

def sample(logits, temperature, top_k, top_p, rng):
    """One token id from logits (vocab,). temperature 0: the likeliest. top_k: only the k likeliest, 0: all. top_p: only
    the smallest set of likeliest tokens whose probabilities reach p."""
    if logits.isnan().any():
        raise InputError("the model's scores are not numbers, as with damaged weights; fetch or train it anew.")
    if temperature == 0:
        return logits.argmax().item()
    logits, ids = (logits.double() / temperature).sort(descending=True, stable=True)
    if top_k:
        logits = logits[:top_k]
    p = logits.softmax(-1)
    allowed = p.cumsum(-1) - p < top_p
    allowed[0] = True                                    # top_p 0 leaves the likeliest
    return ids[torch.multinomial(p[allowed], 1, generator=rng)].item()


@torch.no_grad()
def generate(model, cache, prompt, count, choose, stops=(), gain=None):
    """Yield up to `count` token ids that continue `prompt` (ids), each as soon as it is chosen; end before one of `stops`.

    The prompt is taken in at once, then a token at a step. choose(logits (vocab,)) -> id.
    """
    device = next(model.parameters()).device
    tokens = prompt
    for _ in range(count):
        logits, _ = model(torch.tensor([tokens], device=device), cache, gain=gain, last=True)
        token = choose(logits[0, -1].cpu())
        if token in stops:
            return
        yield token
        tokens = [token]


# ------------------------------------------------------------------------------------------------ reports

def cache_report(cache):
    """Tokens, slots, CR per layer, and bytes used against an uncompressed cache's, as lines of text."""
    slots, tokens = cache.lengths.sum((1, 2)).tolist(), sum(cache.seen) * cache.lengths[0].numel()
    full = tokens * 2 * cache.config.head_dim * cache.keys[0].element_size()
    if sum(slots) == tokens:
        return f"{cache.seen[0]} tokens; {tokens:,} slots, {cache.bytes.used:,} bytes of cache, nothing merged"
    layers = "  ".join(f"{i}: {cache.seen[i] * cache.lengths[i].numel() / n:.2f}" for i, n in enumerate(slots))
    return (f"{cache.seen[0]} tokens; {sum(slots):,} slots where an uncompressed cache has {tokens:,}: "
            f"CR {cache.compression_ratio:.2f}\n"
            f"CR per layer   {layers}\n"
            f"bytes of cache {cache.bytes.used:,} used, {full:,} uncompressed")


def full_cache_note(model, facts):
    """Whether running these weights without compression is a fair comparison, in a sentence."""
    if not model.config.dmc:
        return "This is a plain model: its cache is always full."
    if facts.get("target_cr") in (None, 1.0):
        return "This model was not trained to merge yet: the full cache is what it knows."
    return (f"This model was retrofitted at CR {facts['target_cr']:g} and never trained to attend without its merges: "
            "compare the bytes, not the text.")


@torch.no_grad()
def merged_segments(model, ids, layer, head):
    """The token ids cut where one head appended: a list of lists. Texts longer than the model's positions are taken in
    pieces of that length, each of which starts anew."""
    device, segments = next(model.parameters()).device, []
    for start in range(0, len(ids), model.config.max_seq_len):
        piece = ids[start:start + model.config.max_seq_len]
        _, alpha = model(torch.tensor([piece], device=device))
        for token, merge in zip(piece, alpha[layer, 0, head].tolist(), strict=True):
            if merge:
                segments[-1].append(token)
            else:
                segments.append([token])
    return segments


def show_segments(segments, tokenizer, colour):
    """The segments as text: in changing colours, or with | between them. A character whose bytes fall into several
    segments is shown in the one that completes it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(tokenizer.token_bytes(segment)) for segment in segments]
    texts[-1] += decoder.decode(b"", final=True)
    if not colour:
        return "|".join(texts)
    shades = [SEGMENT_COLOURS[i % len(SEGMENT_COLOURS)] for i in range(len(texts))]
    return "".join(shade + text.replace("\n", f"{RESET}\n{shade}") + RESET for shade, text in zip(shades, texts, strict=True))


# ------------------------------------------------------------------------------------------------ command line

def find_checkpoint(name):
    """The folder of a model: the one named, or the most compressed model of the run named, or of the newest run."""
    for run in [Path(name)] if name else reversed(runs_by_number()):
        if kept := [p.parent for p in run.glob("cr*/config.json")]:
            return max(kept, key=lambda folder: float(folder.name[2:]))
    if not name:
        raise InputError("there is no finished run in runs; train one with python train.py, or name a model with --ckpt.")
    return locate(name)


def number(low, high=float("inf"), kind=float):
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range, {low} to {high}")
        return value
    return parse


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--ckpt", metavar="NAME_OR_PATH", help="folder of a model or of a run, llama2-7b, -13b, -70b, or "
                        "org/name on Hugging Face [the newest run in runs]")
    parser.add_argument("--random-weights", action="store_true",
                        help="take only the shape of --ckpt llama2-7b and the like; text is bytes")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue [the start of a Python file]")
    parser.add_argument("--prompt-file", type=Path, help="read the prompt from a file")
    parser.add_argument("--tokens", type=number(1, kind=int), help="how many to generate [256, or fewer where positions end]")
    parser.add_argument("--samples", type=number(1, kind=int), default=1, help="how many continuations [1]")
    parser.add_argument("--temperature", type=number(0), default=0.7, help="0: always the likeliest token [0.7]")
    parser.add_argument("--top-k", type=number(0, kind=int), default=0, help="sample from the k likeliest; 0: from all [0]")
    parser.add_argument("--top-p", type=number(0, 1), default=0.95, help="sample from the likeliest that make up p [0.95]")
    parser.add_argument("--seed", type=number(0, kind=int), default=0, help="of the sampling [0]")
    parser.add_argument("--cache", choices=["dmc", "full"], default="dmc", help="full: keep every token, merge nothing [dmc]")
    parser.add_argument("--ops", choices=OPS, default="fast", help="kernels and pages, or the plain functions of dmc.py [fast]")
    parser.add_argument("--show-merges", metavar="LAYER.HEAD", help="print the prompt cut into one head's segments, and stop")
    return parser.parse_args(argv)


def show_merges(args, model, tokenizer, prompt):
    if not model.config.dmc:
        raise InputError("this is a plain model, whose heads merge nothing; choose a checkpoint such as runs/1/cr4.")
    layers, heads = model.config.n_layer, model.config.n_kv_head
    layer, _, head = args.show_merges.partition(".")
    if not (layer.isdecimal() and head.isdecimal() and int(layer) < layers and int(head) < heads):
        raise InputError(f"--show-merges {args.show_merges} names no head; give LAYER.HEAD, "
                         f"from 0.0 to {layers - 1}.{heads - 1}.")
    segments = merged_segments(model, prompt, int(layer), int(head))
    print(f"layer {layer}, head {head}: {len(prompt)} tokens in {len(segments)} slots, CR {len(prompt) / len(segments):.2f}\n")
    print(show_segments(segments, tokenizer, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))


def stream_samples(args, model, tokenizer, prompt, facts):
    positions = model.config.max_seq_len
    count = args.tokens or min(256, positions - len(prompt))
    if len(prompt) + count > positions or count < 1:
        wanted = f" and {count} more" if args.tokens else ""
        raise InputError(f"a prompt of {len(prompt)} tokens{wanted} does not fit the model's {positions} positions; "
                         "shorten the prompt or lower --tokens.")
    weight, gain = next(model.parameters()), None
    if args.cache == "full":
        print(full_cache_note(model, facts) + "\n")
        gain = 0.0 if model.config.dmc else 1.0          # decides nothing
    for i in range(args.samples):
        rng = torch.Generator().manual_seed(args.seed + i)
        choose = partial(sample, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, rng=rng)
        cache = model.Cache(model.config, 1, weight.device, weight.dtype)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        print(tokenizer.decode(prompt), end="", flush=True)
        for token in generate(model, cache, prompt, count, choose, tokenizer.stops, gain):
            print(decoder.decode(tokenizer.token_bytes([token])), end="", flush=True)
        print(decoder.decode(b"", final=True) + f"\n\n{cache_report(cache)}\n")


def run(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.random_weights:
        name, facts, tokenizer = f"{args.ckpt}, random weights", {}, Tokenizer.bytes()
        model = random_model(args.ckpt, OPS[args.ops], device)
    else:
        name = find_checkpoint(args.ckpt)
        model, tokenizer = dmc.load(name, OPS[args.ops], device), Tokenizer.from_folder(name)
        facts = read_json(name / "config.json").get("dmc", {})
    text = read_text(args.prompt_file, "--prompt-file") if args.prompt_file else args.prompt
    prompt = tokenizer.encode(text, prefix=True)
    if not prompt:
        raise InputError("the prompt is empty; give at least one character.")
    print(f"{name}\n")
    if args.show_merges:
        show_merges(args, model, tokenizer, prompt)
    else:
        stream_samples(args, model, tokenizer, prompt, facts)


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")      # a terminal that cannot show a character shows ? instead
    warnings.formatwarning = lambda message, *_: f"generate.py: warning: {message}\n"
    try:
        run(parse(argv))
        return 0
    except InputError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
