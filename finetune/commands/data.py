"""`finetune data recipe.yaml`: rows as the model will see them, their figures, what would make training wrong."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.commands.libraries import load_libraries
from finetune.commands.output import masked, refusals_as_json, stdout_is_stderr, write_json
from finetune.errors import UserError
from finetune.launch.strategy import one_process
from finetune.recipe.load import load_recipe
from finetune.report.views.data import show


def data(recipe_path: str, overrides: Sequence[str], samples: int, as_json: bool = False) -> None:
    """Print the report, for people or (`as_json`) as one JSON document on stdout; docs/data.md says what its keys hold.

    Raises UserError with every problem that would make training wrong, after the report.
    """
    with stdout_is_stderr() as output, refusals_as_json(as_json, output):
        loaded = load_recipe(recipe_path, overrides)
        load_libraries(one_process().use_cpu)
        from finetune.commands.data_document import examine

        document = examine(loaded, samples)
        if as_json:
            write_json(document, output, as_they_are=("samples",))
    if not as_json:
        show(masked(document, as_they_are=("samples",)))
    if document["problems"]:
        raise UserError(document["problems"])
