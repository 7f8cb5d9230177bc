"""Use a DMC model: generate text, and look at what its heads merged.

    python generate.py                                 the newest run's most compressed model continues a prompt
    python generate.py --ckpt runs/1/cr2 --prompt "import os"
    python generate.py --show-merges 0.0               the prompt, cut into the segments that layer 0, head 0 merged
    python generate.py --cache full                    the same weights, every token kept
"""

import argparse
import codecs
import os
import sys
from functools import partial
from pathlib import Path

import torch

import dmc
from dmc import InputError, Tokenizer, read_json
from train import Parser, read_text, runs_by_number

PROMPT = "import os\nimport sys\n\ndef "
SEGMENT_COLOURS = ("\033[48;5;24m\033[97m", "\033[48;5;94m\033[97m", "\033[48;5;29m\033[97m")
RESET = "\033[0m"


# ------------------------------------------------------------------------------------------------ sampling

def sample(logits, temperature, top_k, top_p, rng):
    """One token id from logits (vocab,). temperature 0: the likeliest. top_k: only the k likeliest, 0: all. top_p: only
    the smallest set of likeliest tokens whose probabilities reach p."""
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
def generate(model, cache, prompt, count, choose, eos=None, gain=None):
    """Yield up to `count` token ids that continue `prompt` (ids), each as soon as it is chosen; stop before `eos`.

    The prompt is taken in at once, then a token at a step. choose(logits (vocab,)) -> id.
    """
    device = next(model.parameters()).device
    tokens = prompt
    for _ in range(count):
        logits, _ = model(torch.tensor([tokens], device=device), cache, gain=gain)
        token = choose(logits[0, -1].cpu())
        if token == eos:
            return
        yield token
        tokens = [token]


# ------------------------------------------------------------------------------------------------ reports

def cache_report(cache):
    """Tokens, slots, CR per layer, and bytes used against an uncompressed cache's, as lines of text."""
    slots, tokens = cache.lengths.sum((1, 2)).tolist(), sum(cache.seen) * cache.lengths[0].numel()
    full = tokens * 2 * cache.config.head_dim * cache.keys[0].element_size()
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

def find_checkpoint(path):
    """The folder of a model: the one given, or the most compressed model of the run given, or of the newest run."""
    runs = [path] if path else list(reversed(runs_by_number()))
    for run in runs:
        if (run / "model.safetensors").is_file():
            return run
        if kept := [p.parent for p in run.glob("cr*/model.safetensors")]:
            return max(kept, key=lambda folder: float(folder.name[2:]))
    where = f"{path} holds no checkpoint" if path else "there is no finished run in runs"
    raise InputError(f"{where}; train one with python train.py, or name a folder with --ckpt.")


def number(low, high=float("inf"), kind=float):
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range, {low} to {high}")
        return value
    return parse


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, help="folder of a model or of a run [the newest run in runs]")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue [the start of a Python file]")
    parser.add_argument("--prompt-file", type=Path, help="read the prompt from a file")
    parser.add_argument("--tokens", type=number(1, kind=int), help="how many to generate [until the positions end]")
    parser.add_argument("--samples", type=number(1, kind=int), default=1, help="how many continuations [1]")
    parser.add_argument("--temperature", type=number(0), default=0.7, help="0: always the likeliest token [0.7]")
    parser.add_argument("--top-k", type=number(0, kind=int), default=0, help="sample from the k likeliest; 0: from all [0]")
    parser.add_argument("--top-p", type=number(0, 1), default=0.95, help="sample from the likeliest that make up p [0.95]")
    parser.add_argument("--seed", type=number(0, kind=int), default=0, help="of the sampling [0]")
    parser.add_argument("--cache", choices=["dmc", "full"], default="dmc", help="full: keep every token, merge nothing [dmc]")
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
    count = args.tokens or positions - len(prompt)
    if len(prompt) + count > positions or count < 1:
        wanted = f" and {count} more" if args.tokens else ""
        raise InputError(f"a prompt of {len(prompt)} tokens{wanted} does not fit the model's {positions} positions; "
                         "shorten the prompt or lower --tokens.")
    device = next(model.parameters()).device
    gain = None
    if args.cache == "full":
        print(full_cache_note(model, facts) + "\n")
        gain = 0.0 if model.config.dmc else 1.0          # decides nothing
    for i in range(args.samples):
        rng = torch.Generator().manual_seed(args.seed + i)
        choose = partial(sample, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, rng=rng)
        cache = model.Cache(model.config, 1, device)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        print(tokenizer.decode(prompt), end="", flush=True)
        for token in generate(model, cache, prompt, count, choose, tokenizer.eos, gain):
            print(decoder.decode(tokenizer.token_bytes([token])), end="", flush=True)
        print(decoder.decode(b"", final=True) + f"\n\n{cache_report(cache)}\n")


def run(args):
    folder = find_checkpoint(args.ckpt)
    model = dmc.load(folder, device="cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = Tokenizer.from_folder(folder)
    prompt = tokenizer.encode(read_text(args.prompt_file, "--prompt-file") if args.prompt_file else args.prompt)
    if not prompt:
        raise InputError("the prompt is empty; give at least one character.")
    print(f"{folder}\n")
    if args.show_merges:
        show_merges(args, model, tokenizer, prompt)
    else:
        stream_samples(args, model, tokenizer, prompt, read_json(folder / "config.json"))


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")      # a terminal that cannot show a character shows ? instead
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
