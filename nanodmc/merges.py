"""What the heads of a model merged: the segments of a text, for the terminal and as a web page."""

import base64
import codecs
import json
import sys
from pathlib import Path

import numpy as np

from nanodmc.cli import wrapped
from nanodmc.evaluate import decisions
from nanodmc.files import InputError, write_text
from nanodmc.terminal import COLOURS, RESET, harmless, has_colours, to_show

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


def show_merges(where, model, tokenizer, prompt, name):
    """--show-merges: print the prompt, ids, cut into one head's segments, or write a page of all.

    where: "LAYER.HEAD" or "PAGE.html". name: the model's. Raises InputError.
    """
    if not model.config.dmc:
        raise InputError("this is a plain model, whose heads merge nothing; "
                         "choose a checkpoint such as runs/1/cr4.")
    if where.endswith(".html"):
        page = merges_page(model, prompt, tokenizer, name)
        write_text(where, page)
        print(wrapped(f"The segments of {len(prompt)} tokens in every layer and head are in "
                      f"{to_show(where)}; open it in a browser."))
        return
    layers, heads = model.config.n_layer, model.config.n_kv_head
    layer, _, head = where.partition(".")
    if not (layer.isdecimal() and head.isdecimal() and int(layer) < layers and int(head) < heads):
        raise InputError(f"--show-merges {where} names no head; give LAYER.HEAD, "
                         f"from 0.0 to {layers - 1}.{heads - 1}, or PAGE.html.")
    segments = merged_segments(model, prompt, int(layer), int(head))
    print(f"layer {layer}, head {head}: {len(prompt)} tokens in {len(segments)} slots, "
          f"CR {len(prompt) / len(segments):.2f}\n")
    if has_colours(sys.stdout):
        print(show_segments(segments, tokenizer, colour=True))
    else:
        print(to_show(show_segments(segments, tokenizer, colour=False)))
