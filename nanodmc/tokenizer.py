"""Hugging Face's tokenizer.json, carried out by tiktoken."""

import json
import warnings
from pathlib import Path

import tiktoken

from nanodmc.added_tokens import BLANK, AddedTokens, as_id, ends_of_text
from nanodmc.config import as_whole, named, shown
from nanodmc.files import InputError, in_unicode, listed, read_bytes, read_json
from nanodmc.merge_order import BYTE, follows
from nanodmc.splits import SPLITS, split_name, steps_of
from nanodmc.terminal import harmless

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
    "generation_config.json", "chat_template.jinja")


def byte_alphabet():
    """byte -> the character that byte-level BPE writes for it: itself if visible, else U+0100..."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_CHAR = byte_alphabet()
ALPHABET = frozenset(BYTE_CHAR.values())
CHAR_BYTE = {ord(char): b for b, char in BYTE_CHAR.items()}


def spell_bytes(piece):
    """The bytes that a piece of byte-level BPE, written in that alphabet, stands for."""
    return piece.translate(CHAR_BYTE).encode("latin-1")


def byte_level_ids(vocab, merged):
    """In the order of tiktoken's ranks, bytes -> ids: none for a byte that the vocabulary lacks."""
    ids = {bytes([b]): (vocab[char],) if char in vocab else ()
           for b, char in sorted(BYTE_CHAR.items())}
    return ids | {spell_bytes(piece): (vocab[piece],) for piece in merged
                  if ALPHABET.issuperset(piece)}


def sentencepiece_ids(vocab, merged):
    """The same: bytes, beginnings of characters (the ids of their bytes), characters, merges."""
    by_byte = [vocab[f"<0x{b:02X}>"] for b in range(256)]
    chars = [char for char in vocab if len(char) == 1]
    ids = {bytes([b]): (by_byte[b],) for b in range(256)}
    ids |= {char.encode()[:n]: tuple(by_byte[b] for b in char.encode()[:n])
            for char in chars for n in range(2, len(char.encode()))}
    return ids | {piece.encode(): (vocab[piece],) for piece in [*chars, *merged]}


def has_long_blanks(text, length=2 ** 15):
    """Whether blanks stand in a row, so many that tiktoken would panic on them (about 500,000).

    Every row of twice the length has a block of it that nothing else is in.
    """
    return any(text[i:i + length].isspace() for i in range(0, len(text) - length + 1, length))


class Tokenizer:
    """Text to token ids and back, as a tokenizer.json of Hugging Face says, by tiktoken.

    There are two kinds of BPE: over bytes (GPT-2, Llama 3, SmolLM2), and over characters, with
    U+2581 for blanks and single bytes for characters that the vocabulary lacks (SentencePiece:
    Llama 2, Mistral). tiktoken knows bytes only, and merges first what has the lowest rank.
    SentencePiece fits in as follows. Ranks 0-255 are the bytes. Then come the beginnings of every
    character's UTF-8, so that characters are assembled before anything else merges; then the
    characters; then the merged pieces in the order of their merges. A beginning that is left over
    belongs to an unknown character and becomes the ids of its bytes.

        vocab_size: 1 + the largest id
        rows: how many ids the model knows; `encode` refuses others
        stops: the ids that end a text; eos: the first of them that is a token, or None
        prefix: the ids that the file's template puts before a text, as Llama's beginning-of-text
        files: name -> content, which `save` writes beside a model
        special_ids: config.json's entries for the ids that begin and end a text, or pad it
    """

    def __init__(self, files, special_ids=None, source="tokenizer.json"):
        """Raises InputError for a damaged tokenizer.json, and for what cannot be done exactly."""
        self.files, self.special_ids, self.source = files, special_ids or {}, source
        try:
            facts = json.loads(files["tokenizer.json"])
            self._read_blanks(facts.get("normalizer"), facts.get("pre_tokenizer"))
            self._read_model(facts["model"], facts.get("pre_tokenizer"))
            self._read_added_tokens(facts.get("added_tokens") or [])
            self._read_template(facts.get("post_processor"))
            self._read_decoder(facts.get("decoder"))
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError,
                OverflowError) as error:
            raise self._refusal(
                f"is damaged ({type(error).__name__}: {shown(str(error))})", "restore it") from None
        self.rows = self.vocab_size = 1 + max(self.pieces)
        self.stops = ends_of_text(source, files, self.special_ids, self.vocab | self.added.ids)
        self.eos = next((i for i in self.stops if i in self.pieces), None)

    @classmethod
    def bytes(cls):
        """The 256 bytes and an end-of-text token: the vocabulary of the small model."""
        end = {"id": 256, "content": "<|endoftext|>", "special": True, "normalized": False,
               "single_word": False, "lstrip": False, "rstrip": False}
        bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": True}
        vocab = {char: b for b, char in sorted(BYTE_CHAR.items())}
        facts = {"version": "1.0", "added_tokens": [end], "normalizer": None,
                 "pre_tokenizer": bytewise, "decoder": bytewise,
                 "model": {"type": "BPE", "vocab": vocab, "merges": []}}
        special_ids = {"bos_token_id": None, "eos_token_id": 256}
        return cls({"tokenizer.json": json.dumps(facts, indent=1).encode()}, special_ids)

    @classmethod
    def from_folder(cls, path):
        """A checkpoint's tokenizer, for the ids that the model knows. Raises InputError."""
        path = Path(path)
        files = {name: read_bytes(path / name) for name in TOKENIZER_FILES
                 if (path / name).exists() and not (path / name).is_dir()}
        if "tokenizer.json" not in files:
            raise InputError(
                f"{path} holds no tokenizer.json; copy it there from the model's source.")
        read_json(path / "tokenizer.json")           # says so if it is a pointer or damaged
        config = read_json(path / "config.json") if (path / "config.json").exists() else {}
        if not isinstance(config, dict):
            raise InputError(f"{path / 'config.json'} is no usable configuration; restore it.")
        special_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
                       if key in config}
        tokenizer = cls(files, special_ids, path / "tokenizer.json")
        if tokenizer.eos is None:
            warnings.warn(f"{path} names no token that ends a text: documents will follow each "
                          "other without one, and generated text will end at its length only; "
                          "name one in tokenizer_config.json, as eos_token.", stacklevel=2)
        tokenizer._limit(as_whole(config.get("vocab_size")))
        return tokenizer

    def _limit(self, rows):
        """Take ids from `rows` on, for which the model has no embedding, for unusable."""
        if not isinstance(rows, int) or rows >= self.vocab_size:
            return
        self.rows = rows
        self.special_ids["vocab_size"] = rows       # tokens on disk are for such models only
        self.stops = [i for i in self.stops if i < rows]
        if self.eos is not None and self.eos >= rows:
            warnings.warn(f"the model has embeddings for {rows} ids, and its end of text in "
                          f"{self.source} is {self.eos}: texts have no end for it.", stacklevel=3)
            self.eos = next((i for i in self.stops if i in self.pieces), None)

    def _checked(self, ids):
        """ids, if the model has an embedding for each. Raises InputError."""
        if beyond := sorted({i for i in ids if i >= self.rows}):
            names = [f"{self.decode([i], special=True)!r} ({i})" for i in beyond]
            raise InputError(f"the text has {listed(names)}, and the model has embeddings for ids "
                             f"below {self.rows} only; leave that out, or if {self.source} belongs "
                             "to another model, copy the right one there.")
        return ids

    def _refusal(self, what, remedy="choose a model with another tokenizer"):
        return InputError(f"{self.source} {what}; {remedy}.")

    def _read_blanks(self, normalizer, pre_tokenizer):
        """self.blanks: where U+2581 is put before text.

        "never", before "each" section, or as Metaspace's schemes say: "always" or "first".
        """
        steps = steps_of(normalizer, "normalizers")
        self.normalizes, self.blanks = bool(steps), "never"
        for step in steps:
            if step == {"type": "Prepend", "prepend": BLANK}:
                self.blanks = "each"
            elif step != {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}:
                raise self._refusal(
                    f"normalizes text by {named(step['type'])}, which is not supported here")
        if (pre_tokenizer or {}).get("type") == "Metaspace":
            self.blanks = pre_tokenizer.get("prepend_scheme") or (
                "always" if pre_tokenizer.get("add_prefix_space", True) else "never")

    def _read_model(self, model, pre_tokenizer):
        """The vocabulary and its merges, as a tiktoken Encoding and tables beside it."""
        if (kind := model.get("type") or "BPE") != "BPE":
            raise self._refusal(f"is of type {named(kind)}; only BPE is supported here")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise self._refusal(f"uses {option}, which is not supported here")
        split = split_name(pre_tokenizer)
        if split not in SPLITS:
            raise self._refusal(f"cuts text by an unknown pre-tokenizer, {harmless(split[:300])}")
        self.over_bytes = "ByteLevel" in json.dumps(pre_tokenizer)
        if not self.over_bytes and not model.get("byte_fallback"):
            raise self._refusal("is BPE neither over bytes nor with byte fallback, "
                                "and nothing else is supported here")
        vocab = {piece: as_id(i) for piece, i in model["vocab"].items()}
        if (split == "nothing" and not self.over_bytes
                and not any(BLANK in piece.lstrip(BLANK) for piece in vocab)):
            # faster, and the same ids: no piece reaches into another word
            split = "words with all blanks before them"
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        once = [*dict.fromkeys(reversed(merges))][::-1]      # of a merge that is there twice, the
        repeated = len(once) < len(merges)                   # second counts
        if not all(left in vocab and right in vocab and left + right in vocab
                   for left, right in once):
            raise self._refusal("is damaged (it merges what its vocabulary lacks)", "restore it")
        merged = dict.fromkeys(left + right for left, right in once)
        ids = (byte_level_ids if self.over_bytes else sentencepiece_ids)(vocab, merged)
        self.split, self.ids = SPLITS[split], list(ids.values())
        self._read_words(vocab if model.get("ignore_merges") else [], merged, vocab)
        self.odd_merges = repeated or bool(self.words)
        self.unknown = {rank for rank, ids_of in enumerate(self.ids) if not ids_of}
        ranks = {piece: rank for rank, piece in enumerate(ids)}
        self._check_merges(once, ranks)
        self.encoding = tiktoken.Encoding(
            str(self.source), pat_str=self.split, special_tokens={}, mergeable_ranks=ranks)
        self.vocab, self.pieces = vocab, {i: self._spelled(piece) for piece, i in vocab.items()}

    def _check_merges(self, merges, ranks):
        """Raises InputError where tiktoken would not merge as the pairs of texts say."""
        if self.over_bytes:
            merges = [(spell_bytes(left), spell_bytes(right)) for left, right in merges
                      if ALPHABET.issuperset(left + right)]
        else:
            if any(BYTE.fullmatch(part) for pair in merges for part in pair):
                raise self._refusal("merges single bytes, which is not supported here")
            merges = [(left.encode(), right.encode()) for left, right in merges]
        if not follows(ranks, merges):
            raise self._refusal("lists merges in an order that training does not make, which is "
                                "not supported here")

    def _read_words(self, pieces, merged, vocab):
        """self.words: bytes -> rank of those pieces that no merge makes, but a whole word may be.

        tiktoken does not know them: it would make them within other words too.
        """
        self.words = {}
        for piece in pieces:
            if len(piece) > 1 and piece not in merged and (
                    not self.over_bytes or ALPHABET.issuperset(piece)):
                word = spell_bytes(piece) if self.over_bytes else piece.encode()
                self.words[word] = len(self.ids)
                self.ids.append((vocab[piece],))

    def _spelled(self, piece):
        """The bytes of text that a piece stands for."""
        if self.over_bytes:
            return spell_bytes(piece) if ALPHABET.issuperset(piece) else piece.encode()
        if BYTE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(BLANK, " ").encode()

    def _read_added_tokens(self, tokens):
        """self.added, and self.special: the ids of the special ones."""
        for token in tokens:
            as_id(token["id"])
            for flag in ("single_word", "lstrip", "rstrip"):
                if token.get(flag):
                    raise self._refusal(
                        f"marks {named(token['content'])} as {flag}, which is not supported here")
        self.added = AddedTokens(tokens, self.vocab, self._normalize if self.normalizes else None)
        self.special = self.added.special
        self.pieces |= {i: name.encode() for i, name in self.added.spelled.items()}

    def _read_template(self, post_processor):
        """self.prefix."""
        self.prefix = []
        for step in steps_of(post_processor, "processors"):
            if step["type"] == "TemplateProcessing":
                kinds = [next(iter(part)) for part in step["single"]]
                if kinds.count("Sequence") != 1 or kinds[-1] != "Sequence":
                    raise self._refusal(
                        "puts tokens behind every text, which would end it before it began")
                self.prefix += [as_id(i) for part in step["single"][:-1]
                                for i in step["special_tokens"][part["SpecialToken"]["id"]]["ids"]]
                if not self.pieces.keys() >= set(self.prefix):
                    raise self._refusal("puts a token before every text that it does not have")
            elif step["type"] != "ByteLevel":        # that one moves offsets only
                raise self._refusal(
                    f"has the post-processor {named(step['type'])}, which is not supported here")

    def _read_decoder(self, decoder):
        """self.strips: whether decoding drops the blank that encoding put first."""
        self.strips = not self.over_bytes and any(
            step["type"] == "Strip" and step.get("start") or step["type"] == "Metaspace" and
            step.get("prepend_scheme", "always") != "never"
            for step in steps_of(decoder, "decoders"))

    def _normalize(self, text):
        return (BLANK if self.blanks == "each" else "") + text.replace(" ", BLANK)

    def encode(self, text, special=True, prefix=False):
        """The ids of text, the same as from Hugging Face's tokenizers.

        special: names of special tokens in it become those tokens; False: they are text like any
        other. prefix: with what the template puts before a text (there: add_special_tokens).
        """
        ids, plain = list(self.prefix) if prefix else [], set() if special else self.special
        for at, section in self.added.raw.cut(text, plain):
            if isinstance(section, str):
                section = self._normalize(section) if self.normalizes else section
                for inner_at, part in self.added.normalized.cut(section, plain):
                    first = at + inner_at == 0
                    ids += self._encode(part, first) if isinstance(part, str) else [part]
            else:
                ids.append(section)
        return ids if self.vocab_size <= self.rows else self._checked(ids)

    def _encode(self, text, first):
        """The ids of text without names of tokens in it. first: it opens the whole text."""
        if not self.over_bytes and not self.normalizes:
            text = text.replace(" ", BLANK)
            blank = self.blanks == "always" or self.blanks == "first" and first
            text = BLANK + text if blank and not text.startswith(BLANK) else text
        whole = not self.words and not has_long_blanks(text)
        ranks = self.encoding.encode_ordinary(text) if whole else []
        if not whole or not self.unknown.isdisjoint(ranks):
            ranks = self._encode_pieces(text)
        return [i for rank in ranks for i in self.ids[rank]]

    def _encode_pieces(self, text):
        """The ranks of text, piece by piece, for what tiktoken cannot do by itself.

        Bytes that the vocabulary lacks vanish from the pieces, not from the text: within a piece,
        what stood around one may merge.
        """
        import regex  # comes with tiktoken, which has no call that only splits

        ranks, unknown = [], bytes(self.unknown)
        for match in regex.finditer(self.split, in_unicode(text)):      # as tiktoken reads it
            piece = match[0].encode()
            if piece in self.words:
                ranks.append(self.words[piece])
            elif piece := piece.translate(None, unknown):
                ranks += self.encoding._encode_single_piece(piece)
        return ranks

    def token_bytes(self, ids, special=False):
        """The bytes of ids as they stand inside a text. special: with names of special tokens."""
        return b"".join(self.pieces.get(i, b"") for i in ids if special or i not in self.special)

    def decode(self, ids, special=False):
        """The text of ids, without the blank that encoding put first.

        Bytes that are no UTF-8, as in half a character, become U+FFFD.
        """
        text = self.token_bytes(ids, special).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips else text
