"""A conversation: the template's text, a cache that is kept, and what interrupts an answer."""

import builtins
import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import generate
from conftest import ctrl_c, oracle, refusal
from nanodmc.chat import Chat, TooLong, renderer
from nanodmc.checkpoint import save
from nanodmc.files import InputError
from nanodmc.sampling import chooser
from nanodmc.sampling import generate as continued
from nanodmc.tokenizer import Tokenizer
from test_dmc import model_of

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
TEMPLATE = ("{%- for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}"
            "{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
STRIPPING = TEMPLATE.replace("m['content']", "m['content'] | trim")
MESSAGES = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "Ünï\n"},
            {"role": "user", "content": "more"}]


def tokenizer_with(template):
    facts = {"eos_token": {"content": "<|endoftext|>"}, "chat_template": template}
    return Tokenizer({**Tokenizer.bytes().files,
                      "tokenizer_config.json": json.dumps(facts).encode()})


def chat_of(template=TEMPLATE, positions=400, count=9, **changes):
    model = model_of(4, (4, 2), vocab_size=257, max_seq_len=positions, c=0.0, **changes)
    return Chat(model, tokenizer_with(template), "here", GREEDY, count)


def in_full(chat):
    """The answer to the last message, from the whole conversation's text and an empty cache."""
    ids = chat.tokenizer.encode(chat.render(chat.messages[:-1]))
    count = min(chat.count, chat.model.config.max_seq_len - len(ids))
    return list(continued(chat.model, chat.model.new_cache(1), ids, count, chooser(**GREEDY),
                          chat.tokenizer.stops))


@pytest.mark.parametrize("template", [TEMPLATE, STRIPPING, [{"name": "default",
                                                             "template": TEMPLATE}]])
def test_the_text_is_that_of_transformers(template):
    transformers = oracle("transformers")
    tokenizer = tokenizer_with(template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=oracle("tokenizers").Tokenizer.from_buffer(
            tokenizer.files["tokenizer.json"]), eos_token="<|endoftext|>",
        chat_template=template if isinstance(template, str) else TEMPLATE)
    for n in (1, 2, 3):
        assert renderer(tokenizer, "here")(MESSAGES[:n]) == theirs.apply_chat_template(
            MESSAGES[:n], tokenize=False, add_generation_prompt=True)


@given(st.lists(st.text("ab é\n", min_size=1, max_size=6), min_size=2, max_size=4))
@settings(max_examples=8, deadline=None)
def test_a_kept_cache_answers_as_the_whole_conversation_would(messages):
    """In bytes, whose tokens do not depend on where a text is cut."""
    chat = chat_of()
    cache = chat.cache
    for message in messages:
        answer = list(chat.answer(message))
        said = chat.tokenizer.decode(answer)
        assert chat.messages[-1] == {"role": "assistant", "content": said}
        if chat.tokenizer.encode(said, special=False) == answer:      # it was text, not half of it
            assert answer == in_full(chat)
    assert chat.cache is cache and chat.cache.compression_ratio > 1


def test_a_template_that_tells_the_past_otherwise_is_read_anew():
    chat = chat_of(STRIPPING)
    before = chat.cache
    list(chat.answer(" a "))
    chat.messages[-1]["content"] = chat.messages[-1]["content"] + "  "
    chat.text += "  "                                   # as if the answer had ended in blanks
    assert list(chat.answer("b")) == in_full(chat) and chat.cache is not before


def test_full_positions_begin_anew(capsys):
    chat = chat_of(positions=90)
    list(chat.answer("a" * 20))
    list(chat.answer("b" * 20))
    assert "begins anew" in capsys.readouterr().out and len(chat.messages) == 2
    assert chat.cache.seen[0] < 90
    with pytest.raises(TooLong, match="90 at most"):
        list(chat.answer("c" * 90))
    assert list(chat.answer("d")) and len(chat.messages) == 2


def test_an_answer_that_is_stopped_stays_in_the_conversation():
    chat = chat_of()
    answer = chat.answer("a")
    first = [next(answer), next(answer)]
    chat.stopped = True
    assert list(answer) == []
    assert chat.messages[-1]["content"] == chat.tokenizer.decode(first)
    assert list(chat.answer("b"))


@pytest.fixture
def instruct(tmp_path):
    model = model_of(4, (4, 2), vocab_size=257, max_seq_len=300, c=0.0).float()
    save(model, tmp_path / "model", tokenizer_with(TEMPLATE))
    return tmp_path / "model"


def test_the_command(instruct, monkeypatch, capsys):
    """Two turns, Ctrl-C at the prompt and within an answer, an empty line, /exit."""
    lines = iter(["hello", KeyboardInterrupt, "  ", "again", "/exit", "never read"])

    def read(prompt):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    def interrupted(self, message, real=Chat.answer):
        for token in real(self, message):
            yield token
            if message == "again":
                ctrl_c()

    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr(Chat, "answer", interrupted)
    flags = ["--ckpt", str(instruct), "--temperature", "0", "--tokens", "7"]
    assert generate.main([*flags, "--chat"]) == 0
    out = capsys.readouterr().out
    assert "/exit ends the conversation" in out and "CR" in out and next(lines) == "never read"
    assert generate.main([*flags, "--prompt", "x"]) == 0
    assert "add --chat" in capsys.readouterr().out


def test_the_end_of_the_input_ends_it(instruct, monkeypatch, capsys):
    monkeypatch.setattr(builtins, "input", lambda prompt: (_ for _ in ()).throw(EOFError))
    assert generate.main(["--ckpt", str(instruct), "--chat"]) == 0


def test_what_cannot_talk_says_so(instruct, tmp_path, monkeypatch, capsys):
    model = model_of(4, vocab_size=257).float()
    save(model, tmp_path / "plain", Tokenizer.bytes())
    chat = lambda folder, *more: refusal(
        generate.main, ["--ckpt", str(folder), "--chat", *more], capsys, tmp_path)
    assert "no chat template" in chat(tmp_path / "plain")
    assert "--prompt has no effect with --chat" in chat(instruct, "--prompt", "x")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "jinja2" in chat(instruct)
    monkeypatch.undo()
    for template in ("{{ raise_exception('roles') }}", "{% if %}", "{{ messages + 1 }}",
                     "{{ 1 / 0 }}", "{{ range(10 ** 9) }}", "{{ 'a'.encode('nope') }}",
                     "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"):
        with pytest.raises(InputError, match="chat template of here fails"):
            renderer(tokenizer_with(template), "here")


def test_the_model_runs_without_gradients():
    chat = chat_of()
    list(chat.answer("a"))
    assert torch.is_tensor(chat.cache.keys[0]) and not chat.cache.keys[0].requires_grad
