"""--chat: a conversation by the model's own template, whose cache is kept between the turns."""

import codecs
import json
import signal
from contextlib import contextmanager, suppress
from datetime import datetime

import torch

from nanodmc.cli import installing, wrapped
from nanodmc.files import InputError, one_line
from nanodmc.sampling import SETTINGS, chooser, next_logits
from nanodmc.terminal import to_show

OPENING = "Type a message. Ctrl-C stops an answer; /exit or Ctrl-D ends the conversation.\n"


def template_of(tokenizer):
    """The chat template in the files of a Tokenizer, in Jinja's language; None: it has none."""
    if "chat_template.jinja" in tokenizer.files:
        return tokenizer.files["chat_template.jinja"].decode("utf-8", "replace")
    template = None
    with suppress(ValueError, AttributeError):
        template = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}")).get(
            "chat_template")
    if isinstance(template, list):          # several, by name
        template = next((entry.get("template") for entry in template if isinstance(entry, dict)
                         and entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def special_names(tokenizer):
    """bos_token and the like of tokenizer_config.json, which templates may use."""
    facts = {}
    with suppress(ValueError):
        facts = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    name = lambda value: value.get("content", "") if isinstance(value, dict) else value
    return {key: name(value) for key, value in facts.items()
            if key.endswith("_token") and isinstance(value, str | dict)}


def renderer(tokenizer, source):
    """The function messages -> text of a conversation, up to where the next answer begins.

    messages: dicts with role and content. Raises InputError where the tokenizer has no template,
    jinja2 is missing, or the template fails.
    """
    template = template_of(tokenizer)
    if template is None:
        raise InputError(f"{source} has no chat template, so nobody knows how to talk to it; "
                         "continue a text with --prompt, or choose an instruction-tuned model.")
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError("--chat needs the package jinja2; install it with "
                         f"{installing('jinja2')}.") from None

    def refuse(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"raise_exception": refuse, **special_names(tokenizer),
                            "strftime_now": lambda form: datetime.now().strftime(form)}

    def render(messages):
        try:
            return environment.from_string(template).render(
                messages=messages, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the chat template of {source} fails ({one_line(error)}); restore "
                             "it, or continue a text with --prompt.") from None
    render([{"role": "user", "content": "Hello"}])
    return render


class TooLong(InputError):
    """A message alone takes all the positions that the model has."""


class Chat:
    """A conversation. What its cache holds is `text`, but for the tokens that are `pending`.

    sampling: temperature, top_k, top_p and seed. count: tokens of an answer at most, or None.
    """

    def __init__(self, model, tokenizer, source, sampling, count=None, gain=None):
        self.model, self.tokenizer, self.gain = model, tokenizer, gain
        self.render = renderer(tokenizer, source)
        self.choose, self.count = chooser(**sampling), count
        self.messages, self.stopped = [], False
        self.forget()

    def forget(self):
        """An empty cache."""
        self.cache, self.text, self.pending = self.model.new_cache(1), "", []

    def prepare(self, message):
        """The ids that the model is to read next, for a message of the user.

        The template may tell the past otherwise than it was, for instance without the blanks at its
        ends; then all is read again. Where positions run out, the conversation begins anew with
        this message. Raises TooLong where even that does not fit.
        """
        self.messages.append({"role": "user", "content": message})
        text = self.render(self.messages)
        if not text.startswith(self.text):
            self.forget()
        ids = self.pending + self.tokenizer.encode(text[len(self.text):])
        if self.cache.seen[0] + len(ids) < self.model.config.max_seq_len:
            self.text = text
            return ids
        alone = len(self.messages) == 1
        self.messages.clear()
        if alone:
            raise TooLong(f"the message has {len(ids):,} tokens, and the model reads "
                             f"{self.model.config.max_seq_len:,} at most; shorten it.")
        print(wrapped(f"(The model's {self.model.config.max_seq_len:,} positions are full: the "
                      "conversation begins anew.)"))
        self.forget()
        return self.prepare(message)

    def answer(self, message):
        """Yield the ids of the answer, each as soon as it is chosen; self.stopped ends it.

        Nothing is interrupted between layers, so that the cache stays whole.
        """
        ids, given, self.stopped = self.prepare(message), [], False
        left = self.model.config.max_seq_len - self.cache.seen[0] - len(ids)
        for _ in range(min(left, self.count or left)):
            tokens = torch.tensor([ids], device=self.model.lm_head.weight.device)
            with torch.no_grad():
                logits = next_logits(self.model, tokens, self.cache, self.gain)
            token, ids = self.choose(logits[0].cpu(), self.cache.seen[0]), []
            if token in self.tokenizer.stops:
                break
            given, ids = [*given, token], [token]
            yield token
            if self.stopped:
                break
        self.pending = ids
        said = self.tokenizer.decode(given)
        self.messages.append({"role": "assistant", "content": said})
        self.text += said


@contextmanager
def stoppable(chat):
    """Meanwhile Ctrl-C sets chat.stopped."""
    before = signal.signal(signal.SIGINT, lambda *_: setattr(chat, "stopped", True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def talk(args, model, tokenizer, name, gain):
    """--chat: a conversation on the terminal. Returns its cache. Raises InputError.

    args: temperature, top_k, top_p, seed and tokens, as the flags of generate.py.
    """
    sampling = {key: getattr(args, key) for key in SETTINGS}
    chat = Chat(model, tokenizer, name, sampling, args.tokens, gain)
    print(OPENING)
    converse(chat)
    return chat.cache


def converse(chat):
    """Read messages from the terminal and print answers, until /exit or the end of the input."""
    while True:
        try:
            message = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit ends the conversation.)")
            continue
        if message.strip() == "/exit":
            return
        if not message.strip():
            continue
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            with stoppable(chat):
                for token in chat.answer(message):
                    piece = decoder.decode(chat.tokenizer.token_bytes([token]))
                    print(to_show(piece), end="", flush=True)
            print(decoder.decode(b"", final=True) + "\n")
        except TooLong as error:
            print(wrapped(f"({error})"))
