"""`finetune checkpoints RUN`: a run's checkpoints, whether they are whole, and one of them exported as a model."""

from __future__ import annotations

import sys
from pathlib import Path

from finetune.checkpoint.manifest import some
from finetune.checkpoint.survey import pick, survey
from finetune.commands.libraries import load_libraries
from finetune.commands.output import refusals_as_json, write_json
from finetune.errors import UserError
from finetune.recipe.load import load_resolved
from finetune.report.run_folder import CHECKPOINTS
from finetune.report.views.checkpoints import show


def checkpoints(run: str, hashes: bool, as_json: bool = False) -> None:
    """Print the checkpoints of the run in folder `run`, without torch. Raises UserError naming what is damaged, after
    printing.
    """
    with refusals_as_json(as_json, sys.stdout):
        document = survey(Path(run), hashes)
    if as_json:
        write_json(document, sys.stdout)
    else:
        show(document)
    root = Path(run) / CHECKPOINTS
    damaged = [
        f"{root / entry['name']} is damaged: {some(entry['problems'], '; ')}"
        for entry in document["checkpoints"]
        if entry["problems"]
    ]
    if damaged:
        raise UserError(damaged)


def export_checkpoint(run: str, step: str, output: Path, trust_remote_code: bool = False) -> str:
    """Write the checkpoint of `step` (or the `newest`) of a run as the folder that the run's end would have written;
    returns one line about it.

    Every hash is compared first; Python code of a model runs only with `trust_remote_code`. Raises UserError (damaged,
    no such step, output exists, another base) and BrokenExport.
    """
    if output.exists():
        raise UserError(f"{output}: exists already. Give a folder that does not, or delete it.")
    found = pick(Path(run), step)
    loaded = load_resolved(Path(run) / "recipe.yaml")
    if loaded.recipe.model.trust_remote_code and not trust_remote_code:  # the folder says so; the user must
        raise UserError(
            f"{Path(run) / 'recipe.yaml'}: model.trust_remote_code is true: {loaded.recipe.model.name_or_path} brings"
            " Python code of its own. Read that code, and if you trust its author give --trust-remote-code."
        )
    load_libraries(use_cpu=True)
    from finetune.checkpoint.export import export_snapshot

    return f"{output}: step {found.step} of {run} as {export_snapshot(found, loaded, output)}."


def export(run: str, step: str, output: Path, trust_remote_code: bool) -> None:
    """Export and print the line about it."""
    print(export_checkpoint(run, step, output, trust_remote_code), flush=True)
