"""`finetune train`, and one rank of a launch: what can be answered before torch is loaded, then the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.commands.libraries import load_libraries
from finetune.errors import UserError
from finetune.launch.environment import from_environment, is_launched
from finetune.launch.launcher_command import check_ranks_asked_for, launched_by
from finetune.launch.preflight import resolve
from finetune.launch.start import launch_train
from finetune.process.exit_status import run_guarded
from finetune.process.stop_signals import stop_when_launcher_dies
from finetune.recipe.load import load_recipe
from finetune.report.console import Console
from finetune.report.run_folder import is_finished, refuse_links_out


def train(recipe_path: str, overrides: Sequence[str], launch_file: str | None) -> None:
    """Launch the trainer and end with its status, or train as the rank that this process is. Does not return."""
    if not is_launched():
        sys.exit(run_guarded(lambda: launch_train(recipe_path, overrides, launch_file)))
    if launch_file is not None:
        sys.exit(run_guarded(refuse_launch))
    run_rank([recipe_path, *overrides])


def refuse_launch() -> None:
    """Raises UserError: what was launched does not launch."""
    raise UserError("--launch: this process is already one rank of a launch. Drop it.")


def run_rank(argv: Sequence[str]) -> None:
    """Train the recipe in `argv` in this process and exit with the status that says how it ended. Does not return."""

    def body() -> None:
        if not argv or argv[0].startswith("-"):
            raise UserError(
                f"train.py: expected a recipe first, found {' '.join(argv) or 'nothing'}. Usage: accelerate"
                " launch finetune/train.py recipe.yaml [key=value ...]"
            )
        train_in_place(argv[0], list(argv[1:]))

    code = run_guarded(body)
    if code and is_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the interpreter's own end may wait for ranks that wait for this one
    sys.exit(code)


def train_in_place(recipe_path: str, overrides: Sequence[str]) -> None:
    """Train in this process, one of the ranks of a launch (or alone). Raises FinetuneError for every expected end."""
    loaded = load_recipe(recipe_path, overrides)
    ranks_asked, launch_file = launched_by()
    strategy = from_environment(os.environ, launch_file)
    check_ranks_asked_for(strategy, ranks_asked)
    if is_launched():
        stop_when_launcher_dies()
    resolve(loaded, strategy)  # for its refusals, before seconds go by with imports
    output_dir = Path(loaded.recipe.output_dir).absolute()
    refuse_links_out(output_dir)
    console = Console(enabled=int(os.environ.get("RANK", "0")) == 0)
    # where machines may not share the disk, rank 0's view counts: run.py asks it
    if strategy.machines == 1 and loaded.recipe.checkpoint.resume != "never" and is_finished(output_dir):
        console.say(f"{output_dir} holds a finished run: nothing to do. For another run give another output_dir.")
        return
    console.say("finetune: loading libraries ...")
    load_libraries(strategy.use_cpu, loaded.recipe.training.deterministic)
    from finetune.training.run import run

    run(loaded, strategy, output_dir, console)
