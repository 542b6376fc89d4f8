"""The command line: wiring only. No command loads torch before its first stage is done."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from finetune import __version__
from finetune.commands.check import check as check_recipe
from finetune.commands.checkpoints import checkpoints as list_checkpoints
from finetune.commands.checkpoints import export as write_checkpoint
from finetune.commands.data import data as show_data
from finetune.commands.export import export as export_adapter
from finetune.commands.generate import generate as print_answers
from finetune.commands.plan import plan as plan_recipe
from finetune.commands.train import train as train_recipe
from finetune.commands.verify import verify as verify_recipe
from finetune.process.exit_status import run_guarded

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Fine-tune causal language models with exact gradient accumulation.",
    pretty_exceptions_enable=False,
)
Recipe = Annotated[str, typer.Argument(help="recipe.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example training.max_steps=20")]
Launch = Annotated[str | None, typer.Option(help="an accelerate_configs/*.yaml; one process without it")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]


def end(body: Callable[[], None]) -> None:
    """Run a command's body and exit with its status. Does not return."""
    sys.exit(run_guarded(body))


def print_version(asked: bool) -> None:
    """`finetune --version`."""
    if asked:
        print(f"finetune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def train(recipe: Recipe, overrides: Overrides = None, launch: Launch = None) -> None:
    """Check the recipe, launch the trainer and end with its status."""
    train_recipe(recipe, overrides or [], launch)


@app.command()
def check(recipe: Recipe, overrides: Overrides = None, launch: Launch = None, as_json: AsJson = False) -> None:
    """Say whether a recipe is right: keys, launch file, batch, model, tokenizer, a sample of the data."""
    end(partial(check_recipe, recipe, overrides or [], launch, as_json))


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    launch: Annotated[
        str | None, typer.Option(help="an accelerate_configs/*.yaml; single_gpu or multi_gpu.yaml without it")
    ] = None,
    device_memory: Annotated[str | None, typer.Option(help="of each device, such as 40GiB")] = None,
    host_memory: Annotated[str | None, typer.Option(help="of each machine, such as 512GiB")] = None,
    ranks: Annotated[int | None, typer.Option(help="devices over all machines, instead of the launch file's")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe takes in memory, whether it fits, and the cheapest change that makes it fit; needs no GPU and
    no weights.
    """
    end(partial(plan_recipe, recipe, overrides or [], launch, device_memory, host_memory, ranks, as_json))


@app.command()
def verify(
    recipe: Recipe,
    overrides: Overrides = None,
    launch: Launch = None,
    full: Annotated[bool, typer.Option("--full", help="the real model and row lengths, not shrunk ones")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare accumulated gradients with one big batch, on this machine, under this launch."""
    end(partial(verify_recipe, recipe, overrides or [], launch, full, as_json))


@app.command()
def data(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="sample rows to print")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model sees them, trained tokens in colour, and what would make training wrong."""
    end(partial(show_data, recipe, overrides or [], rows, as_json))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="a trained folder (output_dir/model), an adapter, or a hub id")],
    prompt: Annotated[list[str], typer.Argument(help="what the user says; several prompts give several answers")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, tokens")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    seed: Annotated[int, typer.Option(help="for temperature > 0")] = 0,
) -> None:
    """Print the model's answer to a prompt."""
    end(partial(print_answers, model, prompt, max_new_tokens, temperature, seed))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="an adapter folder, for example runs/x/model")],
    output: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
) -> None:
    """Merge an adapter into its base model, and compare the logits before and after."""
    end(partial(export_adapter, model, output, dtype))


@app.command()
def checkpoints(
    run: Annotated[str, typer.Argument(help="a run's output_dir")],
    verify: Annotated[
        bool, typer.Option("--verify", help="read every byte and compare its hash, not only manifests and lengths")
    ] = False,
    as_json: AsJson = False,
    export: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            "--export",
            metavar="STEP OUT",
            help="write the checkpoint of this step, or the newest, as a Hugging Face folder",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="with --export: run the model's own Python code")
    ] = False,
) -> None:
    """List a run's checkpoints, say whether they are whole, or export one as a model."""
    if export is None:
        end(partial(list_checkpoints, run, verify, as_json))
    else:
        end(partial(write_checkpoint, run, *export, trust_remote_code))


def main() -> None:
    """Console script."""
    app()
