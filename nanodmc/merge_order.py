"""Whether tiktoken, which merges by what comes out, merges as a list of pairs says."""

import re
from itertools import groupby

import tiktoken

BYTE = re.compile("<0x[0-9A-F]{2}>")


def follows(ranks, merges):
    """Whether tiktoken with these ranks cuts every text as the merges say.

    ranks: bytes -> rank, in rising order. merges: pairs of bytes in the order of their priority,
    each once; what they make is ranked in the order of its first pair.

    tiktoken joins two neighbours wherever their union is a ranked piece, lowest rank first, and
    inside a piece it has done before exactly what it does when the piece stands alone. So a piece
    is only ever made of the two parts that its own BPE comes to. If those are a listed pair, and
    the pairs of all pieces are listed in the order of the ranks, both ways have the same candidates
    in the same order at every step. In a list that training made, this is so.
    """
    place = {pair: i for i, pair in enumerate(merges)}
    made = dict.fromkeys(left + right for left, right in merges)
    parts = last_parts(ranks, made)
    last = -1
    for piece in made:
        if (now := place.get(parts[piece], -1)) <= last:
            return False
        last = now
    return True


def last_parts(ranks, pieces):
    """For each of the pieces, what its own BPE comes to before it is whole, as a tuple of bytes."""
    by_rank, by_size = list(ranks), sorted(ranks, key=len)
    shorter, done, parts = {}, 0, {}
    for size, group in groupby(sorted(pieces, key=len), key=len):
        while done < len(by_size) and len(by_size[done]) < size:
            shorter[by_size[done]] = ranks[by_size[done]]
            done += 1
        group = list(group)
        if len(group) < len(shorter) / 16:            # an Encoding takes longer than it saves
            parts |= {piece: merged(piece, shorter) for piece in group}
            continue
        encoding = tiktoken.Encoding("shorter pieces", pat_str=r"[\s\S]+", special_tokens={},
                                     mergeable_ranks=shorter)
        parts |= {piece: tuple(by_rank[rank] for rank in encoding._encode_single_piece(piece))
                  for piece in group}
    return parts


def merged(piece, ranks):
    """The parts of a piece, bytes, after BPE: lowest rank first, and of equal ones the leftmost."""
    parts, none = [piece[i:i + 1] for i in range(len(piece))], len(ranks) + 2 ** 31
    joined = [ranks.get(a + b, none) for a, b in zip(parts, parts[1:], strict=False)]
    while joined and (lowest := min(joined)) < none:
        i = joined.index(lowest)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        del joined[i]
        if i > 0:
            joined[i - 1] = ranks.get(parts[i - 1] + parts[i], none)
        if i < len(joined):
            joined[i] = ranks.get(parts[i] + parts[i + 1], none)
    return tuple(parts)
