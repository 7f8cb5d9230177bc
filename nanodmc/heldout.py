"""The held-out text of a comparison: the same documents for every model, cut into its pieces."""

from typing import NamedTuple

from nanodmc.documents import documents, text_files
from nanodmc.files import InputError, in_unicode
from nanodmc.text import load_data

FEWEST, MANY = 4, 16       # documents, where a text is longer than what is used of it


class Piece(NamedTuple):
    """A part of a document that starts with an empty cache."""

    document: int    # its number
    ids: list        # the token before the first one that is predicted, and those predicted
    bytes: int       # of the text that is predicted


def given_documents(patterns):
    """Yield the texts in the files that --data names. Raises InputError."""
    for path in text_files(patterns):
        for text, _ in documents(path, "text"):
            yield in_unicode(text)                               # as the tokenizer reads it


def run_documents(folder, settings, given, key, tokenizer):
    """Yield the texts on which a run validates. given, key: its model's folder and its text's key.

    Raises InputError where the text is no longer the one that the run was trained on.
    """
    _, held_out, now = load_data(settings, given, key)
    if now != key:
        raise InputError(f"the text is not the one that {folder} was trained on; restore it, or "
                         "give a held-out one with --data.")
    start = 0
    for end in held_out.ends.tolist():
        # half a character stands where a single document was cut
        yield tokenizer.decode(held_out[start:end].tolist()).strip("\N{REPLACEMENT CHARACTER}")
        start = end


def chosen(texts, tokenizer, tokens, context):
    """The texts that are used, about `tokens` tokens in all, each from its beginning on.

    Ours: everything, if that is not more. Else no more of a document than a context or 1/16 of the
    tokens, and at most a quarter of them, unless there are too few documents; so a mean has an
    error. Raises InputError where nothing is left.
    """
    cap, taken, sizes, total = max(min(context, tokens // FEWEST), tokens // MANY, 1), [], [], 0
    for text in texts:
        # hardly a token has more than 16 characters
        text = shortened(text[:16 * tokens], tokenizer, tokens)
        if size := len(tokenizer.encode(text, special=False)):
            taken.append(text)
            sizes.append(size)
            total += min(size, cap)
        if total >= tokens:
            break
    while cap < max(sizes, default=0) and sum(min(size, cap) for size in sizes) < tokens:
        cap *= 2
    used = []
    for text, size in zip(taken, sizes, strict=True):
        if tokens <= 0:
            break
        used.append(shortened(text, tokenizer, min(cap, tokens)))
        tokens -= min(size, cap)
    if used := [text for text in used if text]:
        return used
    raise InputError("the held-out text has nothing in it, or nothing that fits into --tokens; "
                     "give another with --data, or more --tokens.")


def shortened(text, tokenizer, tokens):
    """The beginning of a text that takes so many tokens; whole characters."""
    ids = tokenizer.encode(text, special=False)
    if len(ids) <= tokens:
        return text
    return text[:len(tokenizer.decode(ids[:tokens]).rstrip("\N{REPLACEMENT CHARACTER}"))]


def pieces(texts, tokenizer, context):
    """The texts as Pieces of at most `context` predicted tokens.

    Before a document stands what the tokenizer puts before a text, or else its end-of-text token,
    so that every token is predicted. Of a tokenizer without either, the first one is not.
    """
    eos = [] if tokenizer.eos is None else [tokenizer.eos]
    start, cut = tokenizer.prefix[-1:] or eos, []
    for number, text in enumerate(texts):
        ids = start + tokenizer.encode(text, special=False)
        first = len(cut)
        for at in range(0, len(ids) - 1, context):
            part = ids[at:at + context + 1]
            cut.append(Piece(number, part, len(tokenizer.token_bytes(part[1:]))))
        if len(cut) > first:        # a blank that only the tokenizer put there is no text
            known = 0 if start else len(tokenizer.token_bytes(ids[:1]))
            surplus = sum(piece.bytes for piece in cut[first:]) - len(text.encode()) + known
            cut[first] = cut[first]._replace(bytes=cut[first].bytes - surplus)
    return cut
