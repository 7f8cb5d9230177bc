"""How the known pre-tokenizers cut a text into pieces, each of which is encoded by itself."""

import json

from nanodmc.added_tokens import BLANK

# numerals, with those of Unicode 17, which tiktoken does not know yet
NUMERAL = "\\p{N}\U00011de0-\U00011de9\U00016ff4-\U00016ff6"
SPLITS = {
    "GPT-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "single digits, then GPT-2": rf"[{NUMERAL}]|'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+"
                                 rf"| ?[^\s\p{{L}}{NUMERAL}]+|\s+(?![^\s{NUMERAL}])|\s+",
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "words with all blanks before them": "\u2581*[^\u2581]+|\u2581+",
    "words with one blank before them": "\u2581?[^\u2581]+|\u2581",
    "nothing": r"[\s\S]+",
}


def steps_of(part, plural):
    """A part of tokenizer.json, which may be none, one step or a sequence of them, as a list."""
    return (part or {}).get(plural, [part] if part else [])


def split_name(pre_tokenizer):
    """The name in SPLITS of a pre_tokenizer, or a description of one that is not known."""
    names = []
    for step in steps_of(pre_tokenizer, "pretokenizers"):
        kind, pattern = step["type"], (step.get("pattern") or {}).get("Regex")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            names += ["GPT-2"] if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits"):
            names.append("single digits")
        elif (kind == "Split" and pattern == SPLITS["Llama 3"] and step["behavior"] == "Isolated"
                and not step.get("invert")):
            names.append("Llama 3")
        elif kind == "Metaspace" and step.get("replacement") == BLANK:
            names += ["words with one blank before them"] if step.get("split", True) else []
        else:
            options = {key: value for key, value in step.items() if key != "type"}
            names.append(f"{kind} {json.dumps(options)}")
    return ", then ".join(names) or "nothing"
