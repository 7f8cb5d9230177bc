"""The counts of the attack, as a table: `python tests/attack_counts.py` puts it into the docs."""

import json
from pathlib import Path

HERE = Path(__file__).parent.parent
COUNTS, PAGE = HERE / "results/attack.json", HERE / "docs/reliability.md"
BEGIN, END = "<!-- counts -->\n\n", "\n<!-- end of counts -->"


def table():
    """What results/attack.json says, between the two marks of docs/reliability.md."""
    attacks = json.loads(COUNTS.read_text())["attacks"]
    rows = [f"| {name} | {found['tried']:,} | {found['failed']:,} |"
            for name, found in attacks.items()]
    tried, failed = (sum(found[x] for found in attacks.values()) for x in ("tried", "failed"))
    lines = ["| attack | tried | failed |", "|---|---|---|", *rows,
             f"| **all** | **{tried:,}** | **{failed:,}** |"]
    return BEGIN + "\n".join(lines) + "\n" + END


def main():
    page = PAGE.read_text()
    before, after = page[:page.index(BEGIN)], page[page.index(END) + len(END):]
    PAGE.write_text(before + table() + after)
    print(table())


if __name__ == "__main__":
    main()
