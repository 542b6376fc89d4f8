"""`finetune data recipe.yaml`: rows as the model will see them, their figures, what would make training wrong."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

from finetune.commands.libraries import load_libraries
from finetune.errors import UserError
from finetune.launch.strategy import one_process
from finetune.recipe.load import load_recipe
from finetune.report import redact
from finetune.report.views.data import show


def data(recipe_path: str, overrides: Sequence[str], samples: int, as_json: bool = False) -> None:
    """Print the report, for people or (`as_json`) as one JSON document on stdout; docs/data.md says what its keys hold.

    Raises UserError with every problem that would make training wrong, after the report.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the report's, whatever the libraries print
        try:
            loaded = load_recipe(recipe_path, overrides)
            load_libraries(one_process().use_cpu)
            from finetune.commands.data_document import examine

            document = examine(loaded, samples)
        except UserError as error:
            document = {"ok": False, "problems": list(error.messages)}
            if not as_json:
                raise
    # rows as they are
    document = {key: value if key == "samples" else redact.tree(value) for key, value in document.items()}
    if as_json:
        print(json.dumps(document, ensure_ascii=False), flush=True)
    else:
        show(document)
    if document["problems"]:
        raise UserError(document["problems"])
