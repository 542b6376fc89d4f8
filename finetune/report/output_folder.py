"""Names in a run's output folder; and what it writes stays inside: links out of it are refused before anything is
written.
"""

from __future__ import annotations

import os
from pathlib import Path

from finetune.errors import UserError

CHECKPOINTS, STATE = "checkpoints", "state.json"  # STATE: in each checkpoint, where the run was
BEFORE = "before-"  # what was there before a run that started over: never written to again


def refuse_links_out(output_dir: Path) -> None:
    """Raises UserError naming every symbolic link in `output_dir` and its checkpoints/ that leads out of it.

    `output_dir` itself may be a link, and so may the folders above it.
    """
    home = os.path.realpath(output_dir)
    found: list[str] = []
    for folder in (output_dir, output_dir / CHECKPOINTS):
        if not found and folder.is_dir():
            links = sorted(
                entry.path for entry in os.scandir(folder) if entry.is_symlink() and not entry.name.startswith(BEFORE)
            )
            found += [link for link in links if os.path.commonpath([home, os.path.realpath(link)]) != home]
    if found:
        raise UserError(
            [
                f"output_dir: {link} is a symbolic link to {os.path.realpath(link)}, outside of {output_dir}, and a run"
                " writes nothing there. Remove the link, or set output_dir to a folder on that disk (output_dir itself"
                " may be a link)."
                for link in found
            ]
        )
