"""Token rows on disk: written as a stream, renamed into place, opened memory mapped."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from finetune.errors import UserError

IGNORED = -100
_ARRAYS = {"tokens": np.int32, "mask": np.bool_, "ends": np.int64, "trained": np.int32}


@dataclass(frozen=True)
class TokenRow:
    """One sample: `input_ids` and `labels`, int32 of shape (tokens,). -100 is not trained; the first label is -100."""

    input_ids: np.ndarray
    labels: np.ndarray


class TokenRows:
    """The rows of one split, memory mapped: opening costs nothing, a row is read when it is asked for.

    `lengths` (tokens) and `trained` (trained tokens) have shape (rows,), int64. `fingerprint` names the content.
    """

    def __init__(self, folder: Path, fingerprint: str, index: np.ndarray | None = None):
        """Open the arrays in `folder`; `index` (rows,) picks and repeats stored rows, None takes each once.

        Raises ValueError or OSError when the arrays are missing or do not belong together.
        """
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        self._tokens, self._mask, ends = arrays["tokens"], arrays["mask"], arrays["ends"]
        if not len(self._tokens) == len(self._mask) == ends[-1] or len(arrays["trained"]) != len(ends):
            raise ValueError(f"{folder} is damaged")
        self._offsets = np.concatenate([np.zeros(1, np.int64), ends])
        self._index = np.arange(len(ends)) if index is None else index
        self.lengths = np.diff(self._offsets)[self._index]
        self.trained = np.asarray(arrays["trained"], np.int64)[self._index]
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.lengths)

    def length(self, index: int) -> int:
        """Tokens of row `index`."""
        return int(self.lengths[index])

    def distinct(self) -> np.ndarray:
        """Numbers of rows that together hold every stored row once, whatever the weights."""
        return np.unique(self._index, return_index=True)[1]

    def row(self, index: int) -> TokenRow:
        """Row `index` (0 <= index < len)."""
        stored = self._index[index]
        start, end = self._offsets[stored], self._offsets[stored + 1]
        input_ids = np.array(self._tokens[start:end])
        return TokenRow(input_ids, np.where(self._mask[start:end], input_ids, np.int32(IGNORED)))


class RowWriter:
    """Appends rows to the files of one split; the arrays never lie in memory."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self._files = {name: (folder / f"{name}.npy").open("wb") for name in _ARRAYS}  # until close()
        self._counts = dict.fromkeys(_ARRAYS, 0)
        self._headers = {name: self._write_header(name) for name in _ARRAYS}
        self.rows = self.tokens = self.trained_tokens = 0
        self.max_token_id = -1

    def add(self, input_ids: np.ndarray, trained: np.ndarray) -> None:
        """Append a row: token ids and a bool for each whether it is trained (the first must not be)."""
        assert len(input_ids) >= 1 and not trained[0]
        count = int(np.count_nonzero(trained))
        self.rows, self.tokens = self.rows + 1, self.tokens + len(input_ids)
        self.trained_tokens += count
        self.max_token_id = max(self.max_token_id, int(input_ids.max()))
        for name, values in (("tokens", input_ids), ("mask", trained), ("ends", [self.tokens]), ("trained", [count])):
            self._files[name].write(np.asarray(values, _ARRAYS[name]).tobytes())
            self._counts[name] += len(values)

    def close(self) -> None:
        """Write the final lengths into the headers and close the files."""
        for name, file in self._files.items():
            file.seek(0)
            # numpy pads .npy headers so that the first axis can grow in place
            assert self._write_header(name) == self._headers[name]
            file.close()

    def _write_header(self, name: str) -> int:
        descr = np.lib.format.dtype_to_descr(np.dtype(_ARRAYS[name]))
        header = {"descr": descr, "fortran_order": False, "shape": (self._counts[name],)}
        np.lib.format.write_array_header_1_0(self._files[name], header)
        return self._files[name].tell()


def root() -> Path:
    """The folder of all token caches: $FINETUNE_CACHE/tokens or ~/.cache/finetune/tokens."""
    base = os.environ.get("FINETUNE_CACHE")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "finetune").absolute() / "tokens"


def get_or_build(
    key: str, is_good: Callable[[Path], bool], build: Callable[[Path], None], say: Callable[[str], None]
) -> tuple[Path, bool]:
    """The folder of cache entry `key`, and whether it was there already.

    Any number of processes may call this at once: one builds under a file lock, the others wait and open the result.
    `build(folder)` fills a temporary folder that is renamed when complete, so a killed build leaves no entry.
    Raises UserError when the cache folder cannot be written.
    """
    entry = root() / key
    if is_good(entry):
        return entry, True
    try:
        root().mkdir(parents=True, exist_ok=True)
        with _locked(root() / f"{key}.lock", say):
            if is_good(entry):
                return entry, True
            temporary = _fresh_folder(key)
            try:
                build(temporary)
                shutil.rmtree(entry, ignore_errors=True)
                _rename(temporary, entry, is_good)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the token cache {root()} cannot be written: {error}. Set FINETUNE_CACHE to a folder with enough space."
        ) from error
    return entry, False


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=2)
    except Timeout:
        say("data: another process is tokenising the same data, waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fresh_folder(key: str) -> Path:
    # The host's name keeps nodes apart that share a disk without working file locks.
    prefix = f"{key}.tmp-{socket.gethostname()}-"
    for leftover in root().glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = root() / f"{prefix}{os.getpid()}"
    folder.mkdir()
    return folder


def _rename(temporary: Path, entry: Path, is_good: Callable[[Path], bool]) -> None:
    try:
        temporary.rename(entry)
    except OSError:
        if not is_good(entry):  # a good one is another machine's, which was faster
            raise


def read_summary(entry: Path) -> dict | None:
    """The summary of a cache entry, or None where there is none that can be read."""
    try:
        return json.loads((entry / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
