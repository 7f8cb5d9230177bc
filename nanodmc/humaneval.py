"""Running the code that a model wrote, as HumanEval wants, within limits.

The limits guard against accidents: code that never ends, eats the memory or calls out. They are no
cage for code that means harm. Enforced by the kernel: seconds, memory, no writing into files, and
where `unshare` is permitted a network namespace without any network and the end of all processes
that the code started. Refused by the interpreter only, by an audit hook: sockets, other programs,
foreign libraries, and opening files for writing, removing or renaming them. Not prevented: reading
what the user may read.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

SECONDS, MEMORY = 10, 2 ** 30         # of one program, in seconds and bytes
STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]      # what begins after the function
SAMPLING = {"do_sample": True, "temperature": 0.1, "top_p": 0.95, "max_gen_toks": 512}

# What runs before the program, in its process: argv has the limits, the program and a descriptor.
BEFORE = """
import os, resource, sys
seconds, memory, path, pipe = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with open(path, encoding="utf-8") as f:
    program = f.read()
for name, limit in (("CPU", seconds), ("AS", memory), ("FSIZE", 0), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
REFUSED = ("socket.", "subprocess.", "shutil.", "ctypes.", "os.system", "os.exec", "os.posix_spawn",
           "os.spawn", "os.fork", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.truncate",
           "os.chmod", "os.chown", "os.link", "os.symlink", "os.mkdir", "resource.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
def refuse(event, arguments, REFUSED=REFUSED, WRITING=WRITING):
    if event.startswith(REFUSED) or event == "open" and arguments[2] & WRITING:
        raise PermissionError(event + " is refused here")
sys.addaudithook(refuse)
sys.argv = [path]
exec(compile(program, path, "exec"), {"__name__": "__main__"})
os.write(pipe, b"passed")
"""


@cache
def isolation():
    """The command that a program is run under: unshare with its flags, or nothing."""
    command = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
    if not shutil.which("unshare"):
        return []
    tried = subprocess.run([*command, "true"], capture_output=True)
    return command if tried.returncode == 0 else []


def limits():
    """What a generated program may not do here, in a sentence."""
    network = ("no network (a namespace of its own)" if isolation() else
               "no network from Python (unshare is not permitted here, so nothing else bars it)")
    return (f"Generated code runs in a process of its own: {SECONDS} s, {MEMORY / 2 ** 30:g} GB, "
            f"no writing into files, {network}; it can read your files.")


def passes(program, seconds=SECONDS, memory=MEMORY):
    """Whether a Python program comes to its end, without an exception, within the limits.

    To leave early, as by sys.exit(0), is not to come to the end. seconds: on the clock, and of
    processor time. memory: in bytes of address space. What the program prints goes nowhere.
    """
    with tempfile.TemporaryDirectory(prefix="humaneval-") as folder:
        path = Path(folder, "program.py")
        path.write_text(program, encoding="utf-8", errors="replace")
        reader, writer = os.pipe()
        command = [*isolation(), sys.executable, "-I", "-S", "-B", "-c", BEFORE,
                   str(seconds), str(memory), str(path), str(writer)]
        try:
            process = subprocess.Popen(
                command, cwd=folder, pass_fds=[writer], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={"PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8"})
            os.close(writer)
            try:
                return said(reader, time.monotonic() + seconds) == b"passed"
            finally:
                end(process)
        finally:
            os.close(reader)


def said(reader, deadline):
    """What comes through a pipe until it is closed, says "passed", or the deadline is over."""
    heard = b""
    while (left := deadline - time.monotonic()) > 0 and select.select([reader], [], [], left)[0]:
        part = os.read(reader, 64)
        heard += part
        if not part or heard == b"passed":
            break
    return heard


def end(process):
    """End a process and what it started, as far as that stayed in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def judge(problem, completions):
    """For lm_eval: pass@1 of a problem, which has prompt, test and entry_point."""
    program = (f"{problem['prompt']}{completions[0]}\n\n{problem['test']}\n\n"
               f"check({problem['entry_point']})\n")
    return {"pass@1": float(passes(program))}


def task(include=None):
    """HumanEval as a task of lm_eval, 0-shot, one completion by the paper's sampling.

    include: a folder; if it holds HumanEval.jsonl or HumanEval.jsonl.gz, the problems come from
    there, else from the hub. lm_eval's own task of that name is greedy, fetches a program to judge
    with from the hub, and runs the code without these limits. Ours: at most 512 tokens.
    """
    files = [Path(include, name) for name in ("HumanEval.jsonl", "HumanEval.jsonl.gz")
             if include and Path(include, name).is_file()]
    source = {"dataset_path": "openai/openai_humaneval"}
    if files:
        source = {"dataset_path": "json",
                  "dataset_kwargs": {"data_files": {"test": str(files[0].absolute())}}}
    return {"task": "humaneval", **source, "test_split": "test", "output_type": "generate_until",
            "doc_to_text": "{{prompt}}", "doc_to_target": "{{test}}",
            "process_results": judge, "num_fewshot": 0,
            "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"until": STOPS, **SAMPLING}}
