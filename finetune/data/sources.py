"""Where rows come from: local files and folders, and data sets on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.files import Record, content_hash, expand, read_files
from finetune.data.formats import SourceFormat, SourceRow, recognise, to_row
from finetune.errors import UserError
from finetune.recipe.fields import SourceSection
from finetune.recipe.load import LoadedRecipe


@dataclass(frozen=True)
class Source:
    """One entry of data.train or data.eval, opened.

    `setting` names it in the recipe (`recipe.yaml:9: data.train`), `identity` changes with its content and with how it
    is read, `local` is whether its rows are in local files, `read()` starts over from its first row.
    """

    name: str
    setting: str
    shape: SourceFormat
    identity: str
    weight: float
    local: bool
    read: Callable[[], Iterator[SourceRow]]

    def key(self) -> str:
        """The identity as a file name."""
        return hashlib.sha256(self.identity.encode()).hexdigest()[:32]

    @property
    def kind(self) -> str:
        """chat, pair or text."""
        return self.shape.kind


def open_sources(loaded: LoadedRecipe, part: str) -> list[Source]:
    """The sources of data.train or data.eval (`part`). Raises UserError, here or while reading."""
    sections = getattr(loaded.recipe.data, part) or []
    sources = []
    for i, section in enumerate(sections):
        key = f"data.{part}[{i}]"
        streaming = loaded.recipe.data.streaming and part == "train"
        sources.append(open_source(section, f"{loaded.location(f'{key}.path')}: data.{part}", streaming))
    return sources


def open_source(section: SourceSection, setting: str, streaming: bool = False) -> Source:
    """Open local files (an absolute path) or a hub data set and recognise its format from the first row's columns.

    Reading yields rows in file order; with `streaming` those of a hub data set are fetched as they are read.
    Raises UserError, here or while reading, with file and line of what is wrong.
    """
    path = section.path
    if os.path.isabs(path):
        if section.subset is not None:
            said = f"subset is '{section.subset}', but {path} is local. Subsets are of hub data sets."
            raise UserError(f"{setting}: {said}")
        files = expand(Path(path), section.split, setting)
        name = Path(path).name + (f" [{section.split}]" if section.split != "train" else "")
        content, records = content_hash(files), partial(read_files, files)
    else:
        dataset = _hub_dataset(section, setting, streaming)
        name = f"{path} [{section.split}]"
        records = partial(_hub_rows, dataset, name)
        content = _first_rows_hash(records) if streaming else str(dataset._fingerprint)
    first = next(records(), None)
    if first is None:
        raise UserError(f"{setting}: {path} holds no rows.")
    shape = recognise(*first, section.format, section.columns, section.system)
    how = [content, shape.format, shape.kind, dict(shape.columns), section.system]
    identity = json.dumps(how, sort_keys=True)
    return Source(name, setting, shape, identity, section.weight, os.path.isabs(path), partial(_rows, records, shape))


def _rows(records: Callable[[], Iterator[Record]], shape: SourceFormat) -> Iterator[SourceRow]:
    return (to_row(where, record, shape) for where, record in records())


def first_rows(sources: Iterable[Source], limit: int | None) -> Iterator[tuple[int, SourceRow]]:
    """The first `limit` rows over all sources in order (all of them for None), each with its source's index."""
    left = limit
    for index, source in enumerate(sources):
        if left == 0:
            return
        for row in source.read():
            yield index, row
            left = None if left is None else left - 1
            if left == 0:
                return


def _hub_rows(dataset: Iterable[dict], name: str) -> Iterator[Record]:
    for number, record in enumerate(dataset):
        yield f"{name} row {number}", record


def _first_rows_hash(records: Callable[[], Iterator[Record]]) -> str:
    # a stream has no fingerprint; what is kept of it (the sample that is checked) is its first rows
    head = json.dumps([record for _, record in islice(records(), 256)], sort_keys=True, default=str)
    return hashlib.sha256(head.encode()).hexdigest()


def _hub_dataset(section: SourceSection, setting: str, streaming: bool) -> Any:
    import datasets

    if os.environ.get("LOCAL_RANK", "0") != "0":
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(section.path, section.subset, split=section.split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{setting}: '{section.path}' (split '{section.split}') is no local file and cannot be loaded from the hub:"
            f" {reason}"
        ) from error
