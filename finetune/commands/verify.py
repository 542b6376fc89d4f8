"""`finetune verify`: is the update of accumulated micro-batches that of one big batch, on this machine, for this
recipe?
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from finetune.commands.libraries import load_libraries
from finetune.commands.output import refusals_as_json, stdout_is_stderr, write_json
from finetune.commands.train import refuse_launch
from finetune.errors import Diverged
from finetune.launch.environment import from_environment, is_launched
from finetune.launch.launcher_command import check_ranks_asked_for, launched_by
from finetune.launch.preflight import resolve
from finetune.launch.start import launch_verify
from finetune.launch.strategy import Strategy
from finetune.process.exit_status import REPORT_FILE
from finetune.recipe.load import load_recipe


def verify(recipe_path: str, overrides: Sequence[str], launch_file: str | None, full: bool, as_json: bool) -> None:
    """Launch the verification and print its report, or take part in it as the rank that this process is. Raises
    Diverged on a difference.
    """
    if launch_file is None:
        verify_in_place(recipe_path, overrides, full, as_json)
    elif is_launched():
        refuse_launch()
    else:
        with refusals_as_json(as_json, sys.stdout):
            launch_verify(recipe_path, overrides, launch_file, full, as_json)


def verify_in_place(recipe_path: str, overrides: Sequence[str], full: bool, as_json: bool) -> None:
    """Verify in this process, one of the ranks of a launch (or alone), and print the table. Raises Diverged on a
    difference.
    """
    with _output() as output, refusals_as_json(as_json, output):
        loaded = load_recipe(recipe_path, overrides)
        ranks_asked, launch_file = launched_by()
        strategy = from_environment(os.environ, launch_file)
        check_ranks_asked_for(strategy, ranks_asked)
        settled = resolve(loaded, strategy)
        load_libraries(strategy.use_cpu)
        from finetune.training.verification import verification

        with tempfile.TemporaryDirectory(prefix="finetune-verify-") as folder:
            report = verification(recipe_path, overrides, settled, None if full else Path(folder))
        if as_json:
            write_json(report, output)
        else:
            print(table(report), file=output)
    if not report["passed"]:
        raise Diverged(
            "verify: accumulated gradients differ from one big batch; see the table. Do not train like this."
        )


@contextlib.contextmanager
def _output() -> Iterator[TextIO]:
    """What rank 0 writes to it goes to stdout at the end, or into the file that the launcher prints."""
    with stdout_is_stderr() as stdout:  # DeepSpeed and the compilers print to stdout, on every rank
        output = io.StringIO()
        try:
            yield output
        finally:
            text = output.getvalue().rstrip("\n")
            if text and os.environ.get("RANK", "0") == "0":
                if file := os.environ.get(REPORT_FILE):
                    Path(file).write_text(text, encoding="utf-8")
                else:
                    print(text, file=stdout, flush=True)


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    scale = report["scale"]
    lines = [
        (f"{report['model']} on {Strategy(**report['strategy']).describe()}: accumulated against one float32 batch"),
        (
            f"each summed loss is multiplied by {scale['ranks']} ranks x {scale['configured_steps']} configured steps"
            f" = {scale['loss_times']}, and divided by the window's trained tokens; the engine divides by the former"
        ),
        f"{'window':<20} {'rows':>5} {'K':>4} {'norm ratio':>11} {'difference':>11} {'tolerance':>10} {'weights':>8}",
    ]
    for case in report["cases"]:
        lines.append(
            f"{case['name']:<20} {case['rows']:>5} {case['micro_batches']:>4} {case['gradient_norm_ratio']:>11.7f}"
            f" {case['gradient_difference']:>11.1e} {case['tolerance']:>10.1e} {case['weight_difference']:>8.1e}"
            f"  {'equal' if case['passed'] else 'DIFFERENT'}"
        )
    return "\n".join([*lines, "gradients are exact" if report["passed"] else "GRADIENTS ARE WRONG"])
