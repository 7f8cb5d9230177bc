"""--chat: a conversation by the model's own template, whose cache is kept between the turns."""

import signal
from contextlib import contextmanager
from datetime import datetime

from nanodmc.added_tokens import facts_beside
from nanodmc.cli import installing, wrapped
from nanodmc.files import InputError, one_line
from nanodmc.sampling import SETTINGS, chooser, generate
from nanodmc.terminal import print_bytes

OPENING = "Type a message. Ctrl-C stops an answer; /exit or Ctrl-D ends the conversation.\n"


def settings_of(tokenizer):
    """What tokenizer_config.json says beside a Tokenizer's file."""
    return facts_beside(tokenizer.source, "tokenizer_config.json", tokenizer.files)


def template_of(tokenizer):
    """The chat template in the files of a Tokenizer, in Jinja's language; None: it has none."""
    if "chat_template.jinja" in tokenizer.files:
        return tokenizer.files["chat_template.jinja"].decode("utf-8", "replace")
    template = settings_of(tokenizer).get("chat_template")
    if isinstance(template, list):          # several, by name
        template = next((entry.get("template") for entry in template if isinstance(entry, dict)
                         and entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def special_names(tokenizer):
    """bos_token and the like of tokenizer_config.json, which templates may use."""
    name = lambda value: value.get("content", "") if isinstance(value, dict) else value
    return {key: name(value) for key, value in settings_of(tokenizer).items()
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
        except Exception as error:      # of whatever the template does
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
        start = self.cache.seen[0] + len(ids)
        left = self.model.config.max_seq_len - start
        for token in generate(self.model, self.cache, ids, min(left, self.count or left),
                              self.choose, self.tokenizer.stops, self.gain):
            given.append(token)
            yield token
            if self.stopped:
                break
        self.pending = given[self.cache.seen[0] - start:]        # chosen, and not yet read
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
        try:
            with stoppable(chat):
                print_bytes(chat.tokenizer.token_bytes([token]) for token in chat.answer(message))
            print()
        except TooLong as error:
            print(wrapped(f"({error})"))
