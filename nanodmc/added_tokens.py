"""Tokens beside the vocabulary: names that stand for one wherever they occur, and ends of text."""

import json
import re
from pathlib import Path

from nanodmc.config import as_whole
from nanodmc.files import InputError

BLANK = "\u2581"                 # what SentencePiece writes for a blank


def ids_of_added(tokens, vocab):
    """name -> id of the added tokens, as Hugging Face's library gives them.

    It goes by the names: an id in the file counts for nothing, a name of no characters or one that
    was there before is passed over, a piece of the vocabulary keeps its id, and any other name
    takes the next one.
    """
    ids, following = {}, len(vocab)
    for name in (token["content"] for token in tokens):
        if name and name not in ids:
            ids[name] = vocab.get(name, following)
            following = max(following, 1 + ids[name])
    return ids


class Names:
    """Names to look for in a text, name -> id. Of several at one place, the longest counts."""

    def __init__(self, ids):
        self.ids, longest_first = ids, sorted(ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first))) if ids else None

    def cut(self, text, plain):
        """Yield (position, text or id), in turn. plain: ids whose names are like other text."""
        end = 0
        for match in self.pattern.finditer(text) if self.pattern else ():
            if self.ids[match[0]] not in plain:
                if match.start() > end:
                    yield end, text[end:match.start()]
                yield match.start(), self.ids[match[0]]
                end = match.end()
        if end < len(text):
            yield end, text[end:]


class AddedTokens:
    """The added tokens of a tokenizer.json.

        ids: name -> id; special: the ids of special ones
        raw: the names looked for in a text; normalized: in what is between them, normalized
        spelled: id -> the text that the token stands for
        oddities: whether an earlier version, which went by the file's ids, may have read another
            text in them
    """

    def __init__(self, tokens, vocab, normalize=None):
        """normalize: a function of a text; None: nothing is normalized."""
        by_name = {}                    # of two of one name, a special one counts, then the first
        for token in sorted(tokens, key=lambda token: not token.get("special")):
            by_name.setdefault(token["content"], token)
        self.ids = ids_of_added(tokens, vocab)
        self.special = {i for name, i in self.ids.items() if by_name[name].get("special")}
        raw, normalized, self.spelled = {}, {}, {}
        for name in filter(None, by_name):
            i, spelled = self.ids[name], name
            if not by_name[name].get("normalized"):
                raw[name] = i
            elif not normalize:
                normalized[name] = i
            else:
                normalized.setdefault(normalize(name), i)
                spelled = normalize(name).replace(BLANK, " ")
            self.spelled[i] = spelled
        self.raw, self.normalized = Names(raw), Names(normalized)
        self.oddities = ([(t["content"], t["id"]) for t in tokens] != list(self.ids.items())
                         or len(self.special) < len(self.ids)
                         or bool(normalized) and normalize is None)


def facts_beside(source, name, files):
    """What a file of JSON beside tokenizer.json says; nothing where there is none."""
    try:
        facts = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        raise InputError(f"{Path(source).with_name(name)} is damaged; restore it, or give another "
                         "folder.") from None
    return facts if isinstance(facts, dict) else {}


def as_id(i):
    """i, if it is a token's id. Raises ValueError."""
    if not isinstance(i, int) or not 0 <= i < 2 ** 31:
        raise ValueError(f"{i!r} is no id")
    return i


def ends_of_text(source, files, special_ids, ids):
    """The ids that end a text, in turn, from all the places that may name them.

    source: the path of tokenizer.json; files: name -> content of those beside it; special_ids:
    what config.json says; ids: name -> id. Raises InputError where a file is damaged.
    """
    found = []
    for facts in (special_ids, facts_beside(source, "generation_config.json", files)):
        value = facts.get("eos_token_id")
        found += map(as_whole, value if isinstance(value, list) else [value])
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = facts_beside(source, name, files).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        found.append(ids.get(token) if isinstance(token, str) else None)
    return list(dict.fromkeys(i for i in found if type(i) is int and i >= 0))
