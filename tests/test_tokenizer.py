"""Properties of nanodmc/tokenizer.py, with tokenizers and sentencepiece as oracles."""

import codecs
import functools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TEXTS, edit_json, oracle
from nanodmc import checkpoint
from nanodmc.files import InputError
from nanodmc.text import content_key, standard_library
from nanodmc.tokenizer import SPLITS, Tokenizer


@given(st.text())
def test_byte_tokenizer_round_trip(text):
    tokenizer = Tokenizer.bytes()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode() and tokenizer.decode(ids) == text
    assert tokenizer.eos not in ids


# ------------------------------------------------------------------------- tokenizers, trained here

SAMPLE = "".join(Path(f).read_text(encoding="utf-8", errors="ignore")[:4000]
                 for f in standard_library()[:60]) + """
Größe, naïve café, Привет мир, Ελληνικά, \
中文分词测试, 日本語のテキスト, \
한국어, العربية, עברית, हिन्दी, ไทย,
emoji 🙂👍🏽👨‍👩‍👧, 1234567890, ½ ² Ⅷ,
\tTabs, "quotes" and 'apostrophes': it's, we'll, I'd, THEY'RE, don’t … — – \
▁ underscores ▁▁ ∑ ∫ √
"""
SPECIAL = ["<s>", "</s>", "<|start|>"]


def byte_level(pre_tokenizer, alphabet=True, template=False, **model):
    """A tokenizer.json of byte-level BPE. alphabet False: bytes that the sample lacks are
    unknown."""
    tokenizers = oracle("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(**model))
    made.pre_tokenizer = pre_tokenizer(tokenizers.pre_tokenizers, tokenizers.Regex)
    made.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator(SAMPLE.splitlines(keepends=True), trainer)
    if template:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)])
    return made.to_str()


def sentencepiece_model(directory):
    """The processor of a SentencePiece BPE vocabulary with byte fallback."""
    sentencepiece = oracle("sentencepiece")
    (directory / "sample.txt").write_text(SAMPLE)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "sample.txt"), model_prefix=str(directory / "sp"), model_type="bpe",
        vocab_size=1200, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
        character_coverage=0.995, minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "sp.model"))


def sentencepiece_json(processor, normalized=False, **form):
    """The vocabulary as tokenizer.json, in the form that Llama 2's has, or another one."""
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    score = {piece: processor.get_score(i) for i, piece in enumerate(pieces)}
    merges = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))
              if piece[:i] in vocab and piece[i:] in vocab
              and not processor.is_control(vocab[piece]) and not processor.is_byte(vocab[piece])]
    merges.sort(key=lambda pair: (-score[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]))
    special = [{"id": i, "content": name, "special": True, "normalized": normalized,
                "single_word": False, "lstrip": False, "rstrip": False}
               for name, i in (("<unk>", 0), ("<s>", 1), ("</s>", 2))]
    special.append({**special[0], "id": len(pieces), "content": "<|start|>", "special": False})
    llama2 = {
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    model = {
        "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
        "vocab": vocab, "dropout": None, "merges": [" ".join(pair) for pair in merges]}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None,
                       "added_tokens": special, **llama2, **form, "post_processor": template,
                       "model": model})


def gpt2(pre, regex):
    return pre.ByteLevel(add_prefix_space=False)


def digits_then_gpt2(pre, regex):
    return pre.Sequence([pre.Digits(individual_digits=True), gpt2(pre, regex)])


def llama3(pre, regex):
    return pre.Sequence([pre.Split(regex(SPLITS["Llama 3"]), "isolated"),
                         pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def metaspace(scheme, split):
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    return {"normalizer": None, "pre_tokenizer": step}


MAKES = {
    "GPT-2": lambda sp: byte_level(gpt2),
    "GPT-2, bytes missing": lambda sp: byte_level(gpt2, alphabet=False),
    "SmolLM2": lambda sp: byte_level(digits_then_gpt2, alphabet=False),
    "Llama 3": lambda sp: byte_level(llama3, template=True),
    "Llama 3, whole words first": lambda sp: byte_level(llama3, ignore_merges=True),
    "Llama 2": lambda sp: sentencepiece_json(sp),
    "Llama 2, names normalized": lambda sp: sentencepiece_json(sp, normalized=True),
    "Mistral": lambda sp: sentencepiece_json(sp, **metaspace("first", False)),
    "a blank before every section": lambda sp: sentencepiece_json(sp, **metaspace("always", False)),
    "word by word": lambda sp: sentencepiece_json(sp, **metaspace("never", True)),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name -> (ours, the oracle), made when first asked for."""
    made, processor = {}, []

    def of(name):
        tokenizers = oracle("tokenizers")
        if name not in made:
            if not processor:
                processor.append(sentencepiece_model(tmp_path_factory.mktemp("sp")))
            facts = MAKES[name](processor[0])
            made[name] = (Tokenizer({"tokenizer.json": facts.encode()}),
                          tokenizers.Tokenizer.from_str(facts))
        return made[name]
    return of


def assert_same_tokens(ours, theirs, text):
    """The same ids in all four ways, the same text back, and a stream that never shows half a
    character."""
    for special in (True, False):
        theirs.encode_special_tokens = not special
        for prefix in (True, False):
            ids = theirs.encode(text, add_special_tokens=prefix).ids
            assert ours.encode(text, special=special, prefix=prefix) == ids
        if theirs.decode(ids, skip_special_tokens=False) == text:
            assert ours.decode(ids, special=True) == text
            assert ours.special & set(ids) or ours.decode(ids) == text
    if ours.decode(ids, special=True) == text and "\ufffd" not in text:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        stream = [decoder.decode(ours.token_bytes([i], special=True)) for i in ids]
        assert "\ufffd" not in "".join(stream)


@pytest.mark.parametrize("name", MAKES)
@given(text=TEXTS)
@settings(max_examples=150)
def test_tokens_equal_the_tokenizers_library(trained, name, text):
    assert_same_tokens(*trained(name), text)


@pytest.mark.parametrize("name", MAKES)
def test_tokens_of_sources_equal_the_tokenizers_library(trained, name):
    """Longer texts: Python sources, long runs of blanks and of one character, and every character
    of the first planes."""
    ours, theirs = trained(name)
    texts = [Path(f).read_text(encoding="utf-8", errors="ignore")
             for f in standard_library()[::160]]
    planes = [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    texts += ["".join(planes[i:i + 4096]) for i in range(0, len(planes), 4096)]
    texts += ["a".join([" " * n, "\n" * n, "▁" * n, "=" * n, "a" * n])
              for n in (1, 2, 3, 15, 16, 17, 100, 5000)]
    for text in texts:
        assert_same_tokens(ours, theirs, text)


def test_tokens_equal_sentencepiece(trained, tmp_path):
    ours, _ = trained("Llama 2")
    processor = sentencepiece_model(tmp_path)
    for text in (SAMPLE, " two  blanks ", "▁", "x" * 300, "\n\n", *SAMPLE.splitlines()):
        assert ours.encode(text, special=False) == processor.encode(text)


def test_the_byte_tokenizer_is_one_for_the_tokenizers_library(tmp_path):
    ours = Tokenizer.bytes()
    theirs = oracle("tokenizers").Tokenizer.from_str(ours.files["tokenizer.json"].decode())
    for text in (SAMPLE, "a<|endoftext|>b"):
        assert_same_tokens(ours, theirs, text)
    assert ours.encode("<|endoftext|>") == [256]
    assert len(ours.encode("<|endoftext|>", special=False)) == 13


# ----------------------------------------------------------------------------------------- refusals

def changed(**facts):
    return lambda t: t.update(facts)


def changed_model(**facts):
    return lambda t: t["model"].update(facts)


def added(**facts):
    return lambda t: t["added_tokens"][0].update(facts)


def in_turn(*steps):
    return changed(pre_tokenizer={"type": "Sequence", "pretokenizers": list(steps)})


UNKNOWN_SPLIT = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated",
                 "invert": False}


def template_of(ids):
    """A change that puts these ids before every text."""
    return changed(post_processor={
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {"a": {"id": "a", "ids": ids, "tokens": ["a"]}}})


BAD_TOKENIZERS = {
    "a first token that is none": (template_of([99999]), "does not have"),
    "a first token without an id": (template_of(["1"]), "'1' is no id"),
    "unknown pre-tokenizer": (changed(pre_tokenizer={"type": "BertPreTokenizer"}),
                              "unknown pre-tokenizer, BertPreTokenizer"),
    "unknown pattern": (
        in_turn(UNKNOWN_SPLIT,
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}),
        r"Split.*x\+"),
    "a blank in front": (changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
                         "add_prefix_space"),
    "digits in groups": (in_turn({"type": "Digits", "individual_digits": False},
                                 {"type": "ByteLevel", "add_prefix_space": False}), "Digits"),
    "unknown normalizer": (changed(normalizer={"type": "NFKC"}), "NFKC"),
    "unknown post-processor": (changed(post_processor={"type": "BertProcessing"}),
                               "BertProcessing"),
    "tokens behind a text": (changed(post_processor={
        "type": "TemplateProcessing", "special_tokens": {},
        "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<s>"}}]}),
        "behind every text"),
    "another model": (changed_model(type="Unigram"), "type Unigram"),
    "dropout": (changed_model(dropout=0.1), "dropout"),
    "suffixes": (changed_model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "no byte fallback": (changed(pre_tokenizer=None), "byte fallback"),
    "a token that eats blanks": (added(lstrip=True), "lstrip"),
    "a token that is a word": (added(single_word=True), "single_word"),
    "no model": (lambda t: t.pop("model"), "damaged"),
    "no vocabulary": (lambda t: t["model"].pop("vocab"), "damaged"),
    "merges of one": (changed_model(merges=["a"]), "damaged"),
    "a merge of nothing": (changed_model(merges=["a "]), "merges what its vocabulary lacks"),
    "a merge without its piece": (changed_model(merges=["a b"]), "what its vocabulary lacks"),
    "a merge without a part": (changed_model(merges=["ab c"]), "merges what its vocabulary lacks"),
    "an id no number": (added(id="x"), "damaged"),
    "an id negative": (changed_model(vocab={"a": -1}), "damaged"),
    "bytes missing for the fallback": (
        lambda t: (t.update(pre_tokenizer=None), t["model"].update(byte_fallback=True)),
        "damaged"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_tokenizers_that_are_not_known_are_refused_by_name(tmp_path, case):
    change, says = BAD_TOKENIZERS[case]
    (tmp_path / "tokenizer.json").write_bytes(Tokenizer.bytes().files["tokenizer.json"])
    edit_json(tmp_path / "tokenizer.json", change)
    with pytest.raises(InputError, match=says) as refused:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


# ------------------------------------------------------------------------------------ end of text

def test_ends_of_text_are_gathered(tmp_path, plain):
    folder = shutil.copytree(plain, tmp_path / "model")
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=[3, 256]))
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 7]}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "A"}}')
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.stops == [3, 256, 7, 65] and tokenizer.eos == 3
    checkpoint.save(checkpoint.load(plain), tmp_path / "again", tokenizer)
    again = Tokenizer.from_folder(tmp_path / "again")
    assert again.stops == tokenizer.stops and again.files == tokenizer.files


NAMED = {
    "config.json": [{"eos_token_id": 0}, {"eos_token_id": [0]}, {"eos_token_id": "0"},
                    {"eos_token_id": 0.0}],
    "generation_config.json": [{"eos_token_id": 0}, {"eos_token_id": [0, 256]}],
    "tokenizer_config.json": [{"eos_token": "\u0100"},
                              {"eos_token": {"content": "\u0100", "special": True}}],
    "special_tokens_map.json": [{"eos_token": "\u0100"}, {"eos_token": {"content": "\u0100"}}],
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", NAMED)
def test_the_end_of_text_may_stand_in_any_file(tmp_path, plain, name, mark):
    """Even if it is the id 0, which SmolLM2 has; the piece of that id is written U+0100."""
    folder = shutil.copytree(plain, tmp_path / "model")
    edit_json(folder / "config.json", lambda c: c.pop("eos_token_id"))
    facts = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    for named in NAMED[name]:
        (folder / name).write_text(mark + json.dumps(facts | named), encoding="utf-8")
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.eos == tokenizer.stops[0] == 0
    checkpoint.save(checkpoint.load(plain), tmp_path / "again", tokenizer)
    assert Tokenizer.from_folder(tmp_path / "again").stops == tokenizer.stops


NO_END = [None, -1, [], 1.5, "</s>", True, {}, 10 ** 9]


@pytest.mark.parametrize("named", NO_END)
def test_who_has_no_end_of_text_is_warned(tmp_path, plain, named):
    folder = shutil.copytree(plain, tmp_path / "model")
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=named))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "no such token"}')
    with pytest.warns(UserWarning, match="names no token that ends a text"):
        assert Tokenizer.from_folder(folder).eos is None


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_damaged_file_beside_the_tokenizer_is_named(tmp_path, plain, name):
    folder = shutil.copytree(plain, tmp_path / "model")
    for content, damaged in (("{", True), ("[" * 99_999, True), ("[]", False), ("null", False)):
        (folder / name).write_text(content)
        if damaged:
            with pytest.raises(InputError, match=rf"{name} is damaged; restore it"):
                Tokenizer.from_folder(folder)
        else:
            assert Tokenizer.from_folder(folder).eos == 256


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("says", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_the_template_alone_says_what_begins_a_text(tmp_path, plain, template, says):
    """As in transformers: `add_bos_token` counts for nothing beside a tokenizer.json."""
    folder = shutil.copytree(plain, tmp_path / "model")
    step = {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256],
                                                 "tokens": ["<|endoftext|>"]}}}
    if template:
        edit_json(folder / "tokenizer.json", lambda t: t.update(post_processor=step))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", **says}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = oracle("transformers").AutoTokenizer.from_pretrained(folder)("ab").input_ids
    assert Tokenizer.from_folder(folder).encode("ab", prefix=True) == theirs
    assert (theirs[0] == 256) == template


# ---------------------------------------------------------------------------- what files may hold

def added_token(content, i=257, **flags):
    return {"id": i, "content": content, "special": False, "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False, **flags}


NAME, SPECIAL_NAME = added_token("xx"), added_token("xx", special=True)
ODD = {                          # what is appended to the added tokens of the 256 bytes
    "no characters": [added_token("")],
    "no characters, special": [added_token("", special=True), added_token("xx", 258)],
    "no characters, normalized": [added_token("", normalized=True)],
    "a gap before an id": [added_token("xx", 300)],
    "ids in another order": [added_token("xx", 300), added_token("yy", 258)],
    "the same name twice": [NAME, added_token("xx", 258), added_token("y", 259)],
    "special the second time": [NAME, SPECIAL_NAME],
    "special the first time": [SPECIAL_NAME, NAME],
    "normalized the second time": [NAME, added_token("xx", normalized=True)],
    "one id twice": [NAME, added_token("yy")],
    "a piece of the vocabulary": [added_token("a"), added_token("b", 98), added_token("yy", 5)],
    "a blank": [added_token(" "), added_token("\n", 258)],
    "one within another": [NAME, added_token("xxx", 258), added_token("x", 259)],
    "two that overlap": [added_token("ab"), added_token("bcd", 258)],
    "a special one within": [added_token("<|endoftext|>!")],
    "within a special one": [added_token("text"), added_token("|>!", 258)],
    "normalized first": [added_token("xx", normalized=True), added_token("x", 258)],
    "normalized second": [NAME, added_token("x", 258, normalized=True)],
    "patterns": [added_token("x|y"), added_token(".*", 258), added_token("\\", 259)],
}


@pytest.mark.parametrize("case", ODD)
@given(text=st.one_of(TEXTS, st.text("xyab <\n|", max_size=9),
                      st.lists(st.sampled_from(["<|endoftext|>", "!", "x", "ab", "cd", ".*", "x|y"])
                               ).map("".join)))
@settings(max_examples=40)
def test_odd_added_tokens_are_those_of_the_tokenizers_library(case, text):
    ours, theirs = odd_pair(case)
    for special in (True, False):
        theirs.encode_special_tokens = not special
        assert ours.encode(text, special=special) == theirs.encode(text).ids


@functools.cache
def odd_pair(case):
    facts = json.loads(Tokenizer.bytes().files["tokenizer.json"])
    facts["added_tokens"] += ODD[case]
    text = json.dumps(facts)
    theirs = oracle("tokenizers").Tokenizer.from_str(text)
    return Tokenizer({"tokenizer.json": text.encode()}), theirs


MERGES = {
    "a merge twice": (["ab", "bc"], {"merges": [["a", "b"], ["b", "c"], ["a", "b"]]}),
    "words that no merge makes": (["ab", "abc", "bca", "\u0120a", "é", "\u4f60"],
                                  {"merges": [["a", "b"]], "ignore_merges": True}),
    "words, not looked up": (["ab", "abc", "bca"], {"merges": [["a", "b"]]}),
    "nothing but words": (["abc", "bca", "aa"], {"merges": [], "ignore_merges": True}),
    "two ways to a piece": (["ab", "bc", "abc"], {
        "merges": [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]}),
}


@pytest.mark.parametrize("case", MERGES)
@given(text=st.text("abc \u00e9\u4f60", max_size=9))
def test_odd_merges_are_those_of_the_tokenizers_library(case, text):
    ours, theirs = merging_pair(case)
    assert ours.encode(text) == theirs.encode(text).ids


@functools.cache
def merging_pair(case):
    facts, (pieces, model) = json.loads(Tokenizer.bytes().files["tokenizer.json"]), MERGES[case]
    facts["model"]["vocab"] |= {piece: 300 + i for i, piece in enumerate(pieces)
                                if piece not in facts["model"]["vocab"]}
    facts["model"] |= model
    theirs = oracle("tokenizers").Tokenizer.from_str(json.dumps(facts))
    return Tokenizer({"tokenizer.json": json.dumps(facts).encode()}), theirs


def test_oddities_have_another_name_in_the_cache(tmp_path, plain):
    """Tokens on disk from before are of no use where they would be others now."""
    text = tmp_path / "f.py"
    text.write_text("hi")
    keys = set()
    for tokens in ([], [added_token("")]):
        folder = shutil.copytree(plain, tmp_path / str(len(tokens)))
        edit_json(folder / "tokenizer.json", lambda t, new=tokens: t["added_tokens"].extend(new))
        assert Tokenizer.from_folder(folder).added.oddities == bool(tokens)
        keys.add(content_key([text], folder, "text"))
    assert len(keys) == 2


BLANKS = ["ab  " + " " * 10 ** 6 + "x", "y}" + "\n" * 700_000 + "12",
          "}" + " \t\n" * 250_000 + "é", " " * 700_000, "a" + "\xa0\u3000" * 300_000 + "<s>"]


@pytest.mark.parametrize("name", ["GPT-2", "SmolLM2", "Llama 3", "Llama 2"])
def test_a_million_blanks_are_tokens_like_others(trained, name, capfd):
    """With the ids of the tokenizers library, and without a panic of tiktoken on the screen."""
    ours, theirs = trained(name)
    theirs.encode_special_tokens = False
    for text in BLANKS if name == "Llama 3" else BLANKS[:2]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["GPT-2, bytes missing", "Llama 3", "Llama 2"])
def test_half_a_surrogate_pair_is_no_character(trained, name):
    """JSON can spell one. With or without many blanks, it is U+FFFD."""
    for blanks in ("", " " * 2 ** 17):
        assert trained(name)[0].encode(f"a\ud800{blanks}") == trained(name)[0].encode(
            f"a\ufffd{blanks}")
