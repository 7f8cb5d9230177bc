"""What the heads of a model merged: the segments of a text, for the terminal and as a web page."""

import base64
import codecs
import json
from pathlib import Path

import numpy as np

from nanodmc.evaluate import decisions
from nanodmc.terminal import COLOURS, RESET, harmless

TEMPLATE = Path(__file__).with_name("merges.html")


def merged_segments(model, ids, layer, head):
    """The token ids, cut where one head appended: a list of lists."""
    segments = []
    for token, merge in zip(ids, decisions(model, ids)[layer, head].tolist(), strict=True):
        if merge:
            segments[-1].append(token)
        else:
            segments.append([token])
    return segments


def spell(segments, tokenizer):
    """The text of each segment. One that completes a character has all of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(tokenizer.token_bytes(segment)) for segment in segments]
    texts[-1] += decoder.decode(b"", final=True)
    return texts


def show_segments(segments, tokenizer, colour):
    """The segments as one text: in changing colours for a terminal, or with | between them."""
    texts = spell(segments, tokenizer)
    if not colour:
        return "|".join(texts)
    shown = []
    for i, text in enumerate(texts):
        shade = COLOURS[i % len(COLOURS)]
        shown.append(shade + harmless(text).replace("\n", f"{RESET}\n{shade}") + RESET)
    return "".join(shown)


def merges_page(model, ids, tokenizer, name):
    """A web page, as text: the segments of every layer and head, and a map of their CR.

    It is merges.html with the data in it, and needs nothing besides itself.
    """
    merges = decisions(model, ids).bool().numpy()                        # (L, G, T)
    packed = np.packbits(merges, axis=-1)                                # a head fills whole bytes
    data = json.dumps({"model": str(name), "layers": merges.shape[0], "heads": merges.shape[1],
                       "positions": model.config.max_seq_len,
                       "tokens": spell([[i] for i in ids], tokenizer),
                       "merges": base64.b64encode(packed).decode()})
    data = data.replace("<", "\\u003c")                     # so no text can end the script element
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", data)
