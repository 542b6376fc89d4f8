"""Write docs/architecture.md: the prose of scripts/docs/architecture.md, and the rooms as the code has them.

python -m scripts.docs.architecture            writes it
python -m scripts.docs.architecture --check    exits 1 when it is out of date (a test does the same)
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from tests.support.rooms import PACKAGE, ROOMS, ROOT

PAGE = ROOT / "docs" / "architecture.md"
PROSE = Path(__file__).with_suffix(".md")
HEADER = (
    "<!-- Written by scripts/docs/architecture.py from scripts/docs/architecture.md and the code; edit there. -->\n"
)


def sentence(file: Path) -> str:
    """The first sentence of a file's docstring, on one line, without its full stop."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[^.])\.(?:\s|$)", first)[0]


def room(name: str) -> str:
    """One room as Markdown: its purpose, then a line per file."""
    file = PACKAGE / f"{name}.py"
    if file.exists():
        return f"**{name}.py**: {sentence(file)}.\n"
    folder = PACKAGE / name
    lines = [f"**{name}/**: {sentence(folder / '__init__.py')}.", "", "| file | what it holds |", "|---|---|"]
    for path in sorted(folder.rglob("*.py")):
        if path.name != "__init__.py":
            what = sentence(path).replace("|", "\\|")
            lines.append(f"| `{path.relative_to(folder).as_posix()}` | {what} |")
        elif path.parent != folder:
            lines.append(f"| `{path.parent.relative_to(folder).as_posix()}/` | {sentence(path)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page, from the top room to the bottom one."""
    rooms = "\n".join(room(name) for name in reversed(ROOMS))
    return HEADER + PROSE.read_text(encoding="utf-8").replace("{rooms}", rooms.strip())


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/architecture.md is out of date; run python -m scripts.docs.architecture")


if __name__ == "__main__":
    main()
