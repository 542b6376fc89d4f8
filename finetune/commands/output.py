"""What a command leaves on stdout: text for people, or one JSON document for machines, whatever the libraries print."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TextIO

from finetune.errors import UserError
from finetune.report import redact


@contextlib.contextmanager
def stdout_is_stderr(enabled: bool = True) -> Iterator[TextIO]:
    """What libraries print to file descriptor 1 goes to stderr; what is written to the yielded file goes to stdout."""
    if not enabled:
        yield sys.stdout
        return
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as output:
            yield output
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def refusals_as_json(as_json: bool, output: TextIO, found: Mapping[str, Any] | None = None) -> Iterator[None]:
    """A UserError is also a JSON document: `ok`, `problems` and what was `found` until then. Raises it again."""
    try:
        yield
    except UserError as error:
        if as_json:
            write_json({"ok": False, "problems": list(error.messages), **(found or {})}, output)
        raise


def masked(document: Mapping[str, Any], as_they_are: Collection[str] = ()) -> dict[str, Any]:
    """The document with its secrets masked, but for the values of the keys `as_they_are`."""
    return {key: value if key in as_they_are else redact.tree(value) for key, value in document.items()}


def write_json(document: Mapping[str, Any], output: TextIO, as_they_are: Collection[str] = ()) -> None:
    """One document, `masked`."""
    print(json.dumps(masked(document, as_they_are), indent=1, ensure_ascii=False), file=output, flush=True)
