"""Bytes of tensors that are alive: counted storage by storage, on real tensors or on fake ones that hold no memory.

The one place for what torch does not promise to keep: FakeTensorMode and TorchDispatchMode (tests/memory/test_trace.py
fails when an upgrade changes them). A mode sees what ops return; what a kernel allocates and frees inside itself is
seen on neither kind."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "other"


class StorageTracker(TorchDispatchMode):
    """While active, counts the bytes of every storage that an op returned or `hold` was told of, until it is freed.

    `kind` is what new storages are, and the caller's to set. `peaks` has the most of each part of the step (`enter`);
    with `record`, `series` has what was alive, by kind, each time it grew."""

    def __init__(self, record: bool = False) -> None:
        super().__init__()
        self.kind = OTHER
        self.live_bytes = 0
        self.peaks: dict[str, int] = {}
        self.by_kind: Counter[str] = Counter()
        self.series: dict[str, list[dict[str, int]]] = {}
        self._record, self._part = record, ""
        self._storages: dict[int, tuple[weakref.ref, int, str]] = {}

    @property
    def peak_bytes(self) -> int:
        """The most of all parts."""
        return max(self.peaks.values(), default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # a fake tensor has no value; norms, losses and step counts are numbers that no size depends on
        returned = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(returned):
            if isinstance(leaf, Tensor):
                self._see(leaf, None)
        return returned

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count these from now on, as `kind`, also where they were counted as something else."""
        for tensor in tensors:
            self._see(tensor, kind)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Leave these out from now on: what the data room owns is not the step's."""
        for tensor in tensors:
            self._see(tensor, kind="ignored")

    def enter(self, part: str) -> None:
        """A part of the step begins, with what is alive now."""
        self._part = part
        self._note()

    def _see(self, tensor: Tensor, kind: str | None) -> None:
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is not None:
            if known[1] == size and (kind is None or kind == known[2]):
                return
            self._drop(key)
            kind = kind or known[2]
        kind = kind or self.kind
        reference = weakref.ref(storage, lambda _: self._drop(key))
        self._storages[key] = (reference, size, kind)
        if kind != "ignored":
            self.live_bytes += size
            self.by_kind[kind] += size
            self._note()

    def _drop(self, key: int) -> None:
        _, size, kind = self._storages.pop(key)
        if kind != "ignored":
            self.live_bytes -= size
            self.by_kind[kind] -= size

    def _note(self) -> None:
        self.peaks[self._part] = max(self.peaks.get(self._part, 0), self.live_bytes)
        if self._record:
            self.series.setdefault(self._part, []).append(dict(self.by_kind))


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """While active, new tensors have shapes, types and storages, and no memory. Modules are built on the meta device
    before it, and get their fake memory inside, by to_empty and tie_weights."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
