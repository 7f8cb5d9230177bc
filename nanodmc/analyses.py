"""What a model's heads decide on a text: the paper's figures 6 and 8 to 12.

`merges` are the decisions on a text, a bool array (L, G, T) for each of its pieces: True where a
head merged token t into the slot before it. A piece is a document, or a part of one that fits the
model's positions.
"""

import numpy as np

from nanodmc.claim import check_folder
from nanodmc.cli import provenance, wrapped
from nanodmc.contenders import Subject, held_out
from nanodmc.evaluate import decisions
from nanodmc.files import InputError, write_json
from nanodmc.heldout import chosen
from nanodmc.plots import plot_analyses


def pieces_of(documents, size):
    """The documents, lists of ids, cut into pieces of at most `size` tokens."""
    return [ids[i:i + size] for ids in documents for i in range(0, len(ids), size)]


def merges_of(model, pieces):
    """The decisions of a model on each piece."""
    return [decisions(model, piece).bool().numpy() for piece in pieces]


def slots(merges):
    """The slots in use after each piece, (pieces, L, G): its tokens that were appended."""
    return np.array([(~piece).sum(-1) for piece in merges])


def head_ratios(merges):
    """Figures 6 and 10: the CR of each layer and head, (L, G), tokens / slots over all pieces."""
    return sum(piece.shape[-1] for piece in merges) / slots(merges).sum(0)


def padded_ratio(merges):
    """The CR of a cache that pads all heads of a piece's layer to its longest one."""
    tokens = sum(piece.shape[-1] for piece in merges) * merges[0].shape[0]
    return tokens / slots(merges).max(-1).sum()


def growth(merges, lengths):
    """Figure 8: for each length, the CR of the first tokens up to it.

    Over the pieces that are as long as the largest length, so that all points see the same texts.
    Returns (length, CR, standard error) each; the error is over the pieces, None of a single one.
    """
    long = [piece for piece in merges if piece.shape[-1] >= max(lengths)]
    kept = np.array([[(~piece[..., :n]).mean() for n in lengths] for piece in long])  # of a token
    mean = kept.mean(0)
    errors = [None] * len(lengths)
    if len(long) > 1:                     # of 1 / x: the error of x, times the slope 1 / x^2
        errors = kept.std(0, ddof=1) / np.sqrt(len(long)) / mean ** 2
    return [(n, 1 / m, error) for n, m, error in zip(lengths, mean, errors, strict=True)]


def by_position(merges, bins):
    """Figure 9: the mean of alpha over all heads, in as many ranges of positions.

    Returns (first, last position, mean) for each range that holds a token.
    """
    longest = max(piece.shape[-1] for piece in merges)
    total, count = np.zeros(longest), np.zeros(longest)
    for piece in merges:
        total[:piece.shape[-1]] += piece.mean((0, 1))
        count[:piece.shape[-1]] += 1
    edges = np.unique(np.linspace(0, longest, bins + 1).round().astype(int))
    return [(int(a), int(b) - 1, total[a:b].sum() / count[a:b].sum())
            for a, b in zip(edges, edges[1:], strict=False)]


def word_starts(pieces, token_bytes):
    """Where words begin: for each piece a bool array (T,).

    Ours: a token goes on with a word if it begins with a letter, a digit or an underscore, and the
    token before it ends with one; every other token begins something. Bytes above 127 count as
    letters. token_bytes: of a list of ids, as Tokenizer has it.
    """
    def begins(piece):
        spelled = [token_bytes([i]) for i in piece]
        goes_on = [bool(a and b) and in_word(a[-1]) and in_word(b[0])
                   for a, b in zip(spelled, spelled[1:], strict=False)]
        return ~np.array([False, *goes_on])
    return [begins(piece) for piece in pieces]


def in_word(byte):
    """Whether a byte belongs to a word."""
    return byte > 127 or chr(byte).isalnum() or byte == ord("_")


def agreement(merges, starts):
    """Figures 11 and 12 as a number for each layer and head, (L, G): do slots begin with words?

    Ours: the correlation of two binary variables over all tokens but each piece's first (which
    always begins a slot): "is appended" and "begins a word". 1: slots are words; 0: no better than
    chance; also 0 for a head that does always the same.
    """
    appends = np.concatenate([~piece[..., 1:] for piece in merges], axis=-1).astype(float)
    words = np.concatenate([piece[1:] for piece in starts]).astype(float)
    appends -= appends.mean(-1, keepdims=True)
    words -= words.mean()
    norm = np.sqrt((appends ** 2).sum(-1) * (words ** 2).sum())
    return (appends * words).sum(-1) / np.where(norm > 0, norm, np.inf)


def analyse(model, documents, token_bytes, bins=16):
    """All of it, as a dict for JSON. documents: lists of ids. Their pieces have at least 2 tokens.

    CRs are ratios of sums over all pieces.
    """
    pieces = [p for p in pieces_of(documents, model.config.max_seq_len) if len(p) > 1]
    merges = merges_of(model, pieces)
    longest = max(map(len, pieces))
    lengths = sorted({max(1, longest >> i) for i in range(8)})
    ratios = head_ratios(merges)
    return {
        "pieces": len(pieces), "tokens": sum(map(len, pieces)),
        "cr": 1 / (1 / ratios).mean(), "padded_cr": padded_ratio(merges),
        "figure 6": {"cr of layers and heads": ratios.tolist()},
        "figure 8": {"length, cr, standard error": growth(merges, lengths)},
        "figure 9": {"first, last position, mean alpha": by_position(merges, bins)},
        "figure 12": {"agreement with words of layers and heads":
                      agreement(merges, word_starts(pieces, token_bytes)).tolist()}}


# ------------------------------------------------------------------------------------- --analyse

def write_analyses(out, folder, model, tokenizer, data, tokens):
    """--analyse: what a model's heads decide on a text, into the folder `out`, as JSON and PNG.

    folder: the model's. data: files, or None: what the run in whose folder it lies validates on.
    tokens: how many of the text at most; None: 65,536. Raises InputError.
    """
    if not model.config.dmc:
        raise InputError("this is a plain model, whose heads merge nothing; "
                         "choose a checkpoint such as runs/1/cr4.")
    check_folder(out)
    runs = [Subject(folder.parent)] if not data and (folder.parent / "run.json").is_file() else []
    texts, name = held_out(runs, data, "--analyse of a model without a run")
    texts = chosen(texts, tokenizer, tokens or 2 ** 16, model.config.max_seq_len)
    documents = [tokenizer.encode(text, special=False, prefix=True) for text in texts]
    if max(map(len, documents)) < 2:
        raise InputError("the text has no document of two tokens; give another with --data.")
    facts = analyse(model, documents, tokenizer.token_bytes)
    write_json(out / "analyses.json", {"model": str(folder), "text": name, **facts, **provenance()})
    drawn = plot_analyses(facts, out / "analyses.png")
    words = facts["figure 12"]["agreement with words of layers and heads"]
    best = max((x, layer, head) for layer, row in enumerate(words) for head, x in enumerate(row))
    print(wrapped(
        f"{facts['tokens']:,} tokens of {name}: CR {facts['cr']:.2f}, and "
        f"{facts['padded_cr']:.2f} in a cache that pads every head to its layer's longest. Most "
        f"like words are the slots of layer {best[1]}, head {best[2]}: correlation {best[0]:.2f}. "
        f"{out / 'analyses.json'} has the figures"
        + (f", and {out / 'analyses.png'} shows them." if drawn else ".")))
