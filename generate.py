"""Use a DMC model: generate text, and look at what its heads merged.

    python generate.py                  the newest run's most compressed model
                                        continues a prompt
    python generate.py --ckpt runs/1/cr2 --prompt "import os"
    python generate.py --cache full     the same weights, every token kept
    python generate.py --show-merges 0.0
                                        the prompt, cut into the segments that
                                        head 0 of layer 0 merged
    python generate.py --show-merges merges.html
                                        a web page with those of all heads
    python generate.py --prompts in.jsonl --out out.jsonl
                                        continue many prompts at once
    python generate.py --compare runs/1 its models, averaging and eviction
                                        policies side by side, on one text
    python generate.py --tasks piqa,boolq
                                        benchmarks by lm_eval
    python generate.py --chat           talk to an instruction-tuned model
    python generate.py --convert DIR    turn a model that NVIDIA released into
                                        one for --ckpt
    python generate.py --bench          what compression does for throughput
                                        (figure 5 of the paper)
    torchrun --nproc_per_node 2 generate.py ...
                                        the same with the model split between
                                        two GPUs, or two processes
"""

from nanodmc import interrupts

# isort: split
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from nanodmc import benchmarks, megatron
from nanodmc.analyses import write_analyses
from nanodmc.bench import benchmark
from nanodmc.chat import talk, template_of
from nanodmc.checkpoint import SHAPES, find_checkpoint, verify
from nanodmc.cli import OPS, Parser, number, run_command, silence, wrapped
from nanodmc.compare import compare
from nanodmc.files import InputError, read_json
from nanodmc.locks import only_writer
from nanodmc.machine import fast_model
from nanodmc.merges import show_merges
from nanodmc.parallel import load_part, over_ranks, random_part, rank_count, this_rank
from nanodmc.policies import POLICIES
from nanodmc.prompts import LIMITS, answer_prompts, read_prompt
from nanodmc.requests import EMPTY, checked_count
from nanodmc.results import read_results, refuse_files_of, refuse_same_files
from nanodmc.sampling import chooser, generate
from nanodmc.seeds import is_comparison
from nanodmc.settings import flag
from nanodmc.terminal import print_bytes, to_show
from nanodmc.tokenizer import Tokenizer

interrupts.catch()

PROMPT = "import os\nimport sys\n\ndef "

SAMPLING = "tokens samples temperature top_k top_p seed"
TAKES = {            # what has an effect in each mode, besides ckpt and device
    "": f"random_weights verify cache ops prompt prompt_file {SAMPLING}",
    "--show-merges": "show_merges random_weights verify ops prompt prompt_file",
    "--chat": "chat verify cache ops tokens temperature top_k top_p seed",
    "--prompts": f"prompts random_weights verify cache {SAMPLING} out batch cache_gb profile",
    "--analyse": "analyse verify data tokens ops",
    "--compare": "compare policy cr data tokens out ops",
    "--compare FILE.json": "compare out",
    "--convert": "convert tokenizer out",
    "--tasks": "tasks include limit random_weights cache ops seed out",
    "--tasks --policy": "tasks include limit policy cr ops seed out",
    "--bench": "bench model cr prompt_tokens tokens batch cache_gb out",
    "--bench --ckpt": "bench prompt_file cr prompt_tokens tokens batch cache_gb out"}

WHOLE = "show_merges", "analyse", "compare", "tasks", "chat", "convert"     # need the whole model


# ----------------------------------------------------------------------- what happens, in order

def run(args):
    """Check what can be checked, find the model, then do what the flags ask for."""
    device = chosen_device(args)
    for mode in WHOLE if rank_count() > 1 else ():
        if getattr(args, mode):
            raise InputError(f"{flag(mode)} looks at all heads, and {rank_count()} ranks have a "
                             "part each; run it without torchrun.")
    page = (args.show_merges or "").endswith(".html") and Path(args.show_merges)
    refuse_same_files(prompts=args.prompts, prompt_file=args.prompt_file, out=args.out,
                      profile=args.profile, show_merges=page)
    if args.prompts:
        check_prompts(args)
    if args.bench or args.compare:
        (benchmark if args.bench else compare)(args, device)
        return
    if args.convert:
        megatron.convert(args.convert, args.out, args.tokenizer)
        return
    if args.tasks is not None:
        benchmarks.measure(args, lambda: model_for_tasks(args, device))
        return
    if args.prompts:
        with nullcontext() if this_rank() else only_writer(args.out):
            done = read_results(args.out, writes=this_rank() == 0)
            model, tokenizer, name, facts = find_model(args, device)
            print(to_show(f"{name}\n"))
            answer_prompts(args, model, tokenizer, chosen_gain(args, model, facts), done, name)
        return
    text = read_prompt(args.prompt_file) if args.prompt_file else args.prompt
    model, tokenizer, name, facts = find_model(args, device)
    prompt = None if args.chat or args.analyse else tokenizer.encode(text, prefix=True)
    if prompt == []:
        raise InputError(EMPTY)
    print(to_show(f"{name}\n"))
    if args.chat:
        print(cache_report(talk(args, model, tokenizer, name, chosen_gain(args, model, facts))))
    elif args.analyse:
        write_analyses(args.analyse, Path(name), model, tokenizer, args.data, args.tokens)
    elif args.show_merges:
        show_merges(args.show_merges, model, tokenizer, prompt, name)
    else:
        stream_samples(args, model, tokenizer, prompt, facts)


def check_prompts(args):
    """Raise InputError where --prompts lacks something, before a model is loaded."""
    if not args.out:
        raise InputError("--prompts needs --out, a file for the results.")
    if not args.prompts.is_file():
        raise InputError(f"{args.prompts} is no file; check --prompts.")
    if args.batch and len(args.batch) > 1:
        raise InputError("--prompts takes one size of --batch; leave the others out.")


def chosen_device(args):
    """ "cpu", or "cuda": then the GPU of this rank is made the current one."""
    gpus, ranks = torch.cuda.device_count(), rank_count()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda asks for a GPU that PyTorch does not see; "
                         "leave it out, or check nvidia-smi.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if ranks > 1 and device == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
            raise InputError(f"every rank needs a GPU of its own, and there are {gpus}; "
                             "lower --nproc_per_node.")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return device


def find_model(args, device):
    """The model, its tokenizer, its name, and the `dmc` section of its config.json."""
    ops = OPS[args.ops]
    if args.random_weights:
        model = fast_model(random_part(args.ckpt, ops, device))
        return model, Tokenizer.bytes(), f"{args.ckpt}, random weights", {}
    folder = find_checkpoint(args.ckpt)
    refuse_files_of(folder, out=args.out, profile=args.profile)
    if args.verify:
        verify(folder)
    model, tokenizer = fast_model(load_part(folder, ops, device)), Tokenizer.from_folder(folder)
    return model, tokenizer, folder, read_json(folder / "config.json").get("dmc", {})


def model_for_tasks(args, device):
    """The model, its tokenizer, its name and the gain that --cache asks for."""
    model, tokenizer, name, facts = find_model(args, device)
    return model, tokenizer, name, chosen_gain(args, model, facts)


def chosen_gain(args, model, facts):
    """The gain that --cache asks for, as in Transformer.hidden. Of a full cache, prints a note."""
    if args.cache == "dmc":
        return None
    print(wrapped(full_cache_note(model, facts)) + "\n")
    return 0.0 if model.config.dmc else 1.0              # decides nothing


def full_cache_note(model, facts):
    """Whether these weights without compression are a fair comparison, in a sentence."""
    if not model.config.dmc:
        return "This is a plain model: its cache is always full."
    if facts.get("target_cr") in (None, 1.0):
        return "This model was not trained to merge yet: the full cache is what it knows."
    return (f"This model was retrofitted at CR {facts['target_cr']:g} and never trained to attend "
            "without its merges: compare the bytes, not the text.")


# --------------------------------------------------------------------------------- one prompt

def stream_samples(args, model, tokenizer, prompt, facts):
    """Print args.samples continuations, each as it is generated, and what its cache holds."""
    if template_of(tokenizer):
        print("(The prompt goes to the model as it is. To talk to it, add --chat.)\n")
    count = checked_count(model.config, prompt, args.tokens)
    gain = chosen_gain(args, model, facts)
    for i in range(args.samples):
        choose = chooser(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                         seed=args.seed + i)
        cache = model.new_cache(1)
        print(to_show(tokenizer.decode(prompt)), end="", flush=True)
        tokens = generate(model, cache, prompt, count, choose, tokenizer.stops, gain)
        print_bytes(tokenizer.token_bytes([token]) for token in tokens)
        print(f"\n{cache_report(cache)}\n")


def cache_report(cache):
    """Tokens, slots, CR per layer, and the bytes used and allocated against a plain cache's."""
    slots = over_ranks(cache.lengths.sum((1, 2))).tolist()
    heads = cache.lengths[0].numel() * rank_count()
    tokens, size = sum(cache.seen) * heads, 2 * cache.config.head_dim * cache.dtype.itemsize
    used = bytes_report(cache, sum(slots) * size, tokens * size)
    if sum(slots) == tokens:
        return f"{cache.seen[0]} tokens; {tokens:,} slots, nothing merged\n{used}"
    ratios = [f"{i}: {cache.seen[i] * heads / n:.2f}" for i, n in enumerate(slots)]
    total = wrapped(f"{cache.seen[0]} tokens; {sum(slots):,} slots where an uncompressed cache has "
                    f"{tokens:,}: CR {tokens / sum(slots):.2f}")
    return f"{total}\n{in_columns('CR per layer', ratios)}\n{used}"


def bytes_report(cache, used, plain):
    """Bytes in use and allocated, by all ranks, beside those that a plain cache uses."""
    if not hasattr(cache, "bytes"):
        return wrapped(f"The slots in use take {used:,} bytes, where a plain cache takes "
                       f"{plain:,}; what dmc.py allocates beyond them is not counted.")
    allocated = int(over_ranks(torch.tensor(cache.bytes.allocated, device=cache.lengths.device)))
    return wrapped(f"The slots in use take {used:,} bytes of the {allocated:,} allocated, where "
                   f"a plain cache takes {plain:,}.")


def in_columns(title, items, width=80):
    """Short texts beside a title, as many in a line as fit, one below the other."""
    indent, size = len(title) + 3, max(map(len, items)) + 2
    per_line = max(1, (width - indent + 2) // size)
    lines = ["".join(item.ljust(size) for item in items[i:i + per_line]).rstrip()
             for i in range(0, len(items), per_line)]
    return title.ljust(indent) + ("\n" + " " * indent).join(lines)


# ------------------------------------------------------------------------------ the command line

def parse(argv):
    """The arguments, and as `command` a list of them as they were typed. Raises InputError."""
    args, given = flags_of_all_modes().parse_given(argv)
    args.cr = args.cr and [cr for part in args.cr for cr in part]
    args.command = sys.argv[1:] if argv is None else list(argv)
    refuse_idle_flags(args, given)
    return args


def refuse_idle_flags(args, given):
    """Raise InputError where a flag was given that has no effect in the mode asked for."""
    modes = [mode for mode in reversed(TAKES) if mode and " " not in mode]
    mode = next((mode for mode in modes if getattr(args, mode[2:].replace("-", "_"))), "")
    if mode == "--bench" and args.ckpt:
        mode = "--bench --ckpt"
    if mode == "--tasks" and args.policy:
        mode = "--tasks --policy"
    if mode == "--compare" and any(map(is_comparison, args.compare)):
        mode = "--compare FILE.json"
    needs = set() if args.compare or args.convert else {"ckpt"}
    idle = given - {"device", *TAKES[mode].split()} - needs
    if {"prompt", "prompt_file"} <= given - idle:
        raise InputError("--prompt and --prompt-file are two prompts; leave one of them out.")
    if not mode and args.samples > 1 and args.temperature == 0:
        raise InputError("--samples at --temperature 0 repeats one text; leave one of them out.")
    if args.verify and args.random_weights:
        raise InputError("--verify has no effect with --random-weights; leave it out.")
    for name in sorted(idle):
        needs = [other for other in ("--prompts", "--bench", "--compare", "--tasks", "--analyse")
                 if name in TAKES[other].split()]
        what = f"with {mode}" if mode else f"without {' or '.join(needs)}"
        raise InputError(f"{flag(name)} has no effect {what}; leave it out.")


def flags_of_all_modes():
    parser = Parser(__doc__)
    flags = parser.add_argument_group("model")
    flags.add_argument("--ckpt", metavar="NAME", help=(
        "folder of a model or of a run, llama2-7b, -13b, -70b, or org/name on Hugging Face "
        "[the newest run in runs]"))
    flags.add_argument("--random-weights", action="store_true", help=(
        "take only the shape of --ckpt llama2-7b and the like; text is bytes"))
    flags.add_argument("--verify", action="store_true", help=(
        "compare weights and config.json with what was saved with them"))
    flags.add_argument("--cache", choices=["dmc", "full"], default="dmc", help=(
        "full: keep every token, merge nothing [dmc]"))
    flags.add_argument("--ops", choices=OPS, default="fast", help=(
        "kernels and pages, or the plain functions of dmc.py [fast]"))
    flags.add_argument("--device", choices=["cpu", "cuda"], help=(
        "where the model runs [cuda where there is one]"))

    flags = parser.add_argument_group("prompt")
    flags.add_argument("--prompt", default=PROMPT, help=(
        "text to continue [the start of a Python file]"))
    flags.add_argument("--prompt-file", type=Path, metavar="FILE", help=(
        "read the prompt from a file"))
    flags.add_argument("--tokens", type=LIMITS["tokens"], help=(
        "how many to generate [256, or fewer where positions end]"))
    flags.add_argument("--chat", action="store_true", help=(
        "talk to an instruction-tuned model, by its own chat template"))
    flags.add_argument("--samples", type=number(1, 10 ** 6, int), default=1, help=(
        "how many continuations, each with a seed of its own [1]"))

    flags = parser.add_argument_group("sampling")
    flags.add_argument("--temperature", type=LIMITS["temperature"], default=0.7, help=(
        "0: always the likeliest token [0.7]"))
    flags.add_argument("--top-k", type=LIMITS["top_k"], default=0, help=(
        "sample from the N likeliest; 0: from all [0]"))
    flags.add_argument("--top-p", type=LIMITS["top_p"], default=0.95, help=(
        "sample from the likeliest that make up this probability [0.95]"))
    flags.add_argument("--seed", type=LIMITS["seed"], default=0, help=(
        "of the sampling: the same seed gives the same text; with --prompts, each line has one of "
        "its own that follows from this one [0]"))

    flags = parser.add_argument_group("what the heads merged")
    flags.add_argument("--show-merges", metavar="WHERE", help=(
        "LAYER.HEAD: print the prompt cut into one head's segments, and stop; "
        "PAGE.html: write a web page with those of all heads"))
    flags.add_argument("--analyse", type=Path, metavar="DIR", help=(
        "write analyses.json and analyses.png: CR of layers and heads, by length, merges by "
        "position, and whether slots begin where words do (figures 6 and 8 to 12); --data and "
        "--tokens [65536 of the text] count here too"))

    flags = parser.add_argument_group("many prompts")
    flags.add_argument("--prompts", type=Path, metavar="FILE", help=(
        'continue many prompts, a line of JSON each: {"prompt": "..."}, and if wanted id, tokens, '
        "temperature, top_k, top_p, seed, in the place of the flags"))
    flags.add_argument("--out", type=Path, metavar="FILE", help=(
        "where the results go, a line each as it finishes; a file begun earlier is continued"))
    flags.add_argument("--batch", type=number(1, 4096, int), nargs="+", help=(
        "sequences at once [32 on a CPU, 128 on a GPU; with --bench the largest batch, and that "
        "of CR 1]"))
    flags.add_argument("--cache-gb", type=number(0, 1e6), help=(
        "size of the pool of pages [1 on a CPU, what is left on a GPU]"))
    flags.add_argument("--profile", type=Path, metavar="FILE", help=(
        "write what 20 steps of --prompts spend their time on"))

    flags = parser.add_argument_group("benchmark")
    flags.add_argument("--bench", action="store_true", help=(
        "measure throughput and what it is made of, with --ckpt or else random weights; --tokens, "
        "--batch, --cache-gb and --out [bench.json] count here too"))
    flags.add_argument("--model", choices=[*SHAPES, "toy"], metavar="NAME", help=(
        f"shape of the random weights: {', '.join(SHAPES)} or toy "
        "[llama2-7b on a GPU, toy on a CPU]"))
    flags.add_argument("--cr", type=ratios, nargs="+", metavar="CR", help=(
        "compression ratios besides 1, of a model that does not decide [2 4 8]"))
    flags.add_argument("--prompt-tokens", type=number(1, 2 ** 31 - 1, int), nargs="+", help=(
        "lengths of the prompts [2048 on a GPU, 1024 on a CPU, 4096 of the toy, or what the model "
        "has positions for]"))

    flags = parser.add_argument_group("comparison")
    flags.add_argument("--compare", nargs="+", metavar="NAME", help=(
        "measure runs (a folder of train.py: all its models) and models side by side on a held-out "
        "text, with averaging and --policy for plain ones; --cr, --tokens [16384 of the text] and "
        "--out FILE.json, with FILE.md and FILE.png, count here too; or put together the FILE.json "
        "of several seeds"))
    flags.add_argument("--policy", metavar="NAMES", help=(
        f"eviction policies with commas between [{','.join(POLICIES)}]"))
    flags.add_argument("--data", nargs="+", metavar="FILE", help=(
        "the held-out text of --compare and --analyse [what the run validates on]"))

    benchmarks.add_flags(parser)
    megatron.add_flags(parser)
    return parser


def ratios(text):
    """The type of --cr: one ratio, or several with commas between."""
    return [number(1, 1e6)(cr) for cr in text.split(",")]


ratios.kind, ratios.__name__ = float, "float"            # for the help and for argparse's errors


def main(argv=None):
    """The command; argv None: the arguments it was given. Returns the exit code of run_command."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")      # torch's profiler is not to talk

    def carry_out():
        try:
            with silence() if this_rank() else nullcontext():
                run(parse(argv))
        except torch.OutOfMemoryError:
            raise InputError("the GPU's memory ran out; lower --cache-gb or --batch.") from None
        except InputError:
            if this_rank():       # rank 0 says it sooner and torchrun ends this one, unless only
                time.sleep(5)     # this one knows
            raise
    return run_command("generate.py", carry_out)


if __name__ == "__main__":
    sys.exit(main())
