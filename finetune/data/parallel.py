"""A function over batches of rows on all cores, results in order: what comes out does not depend on the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from finetune.errors import UserError
from finetune.process.parent_death import signal_on_parent_death

T = TypeVar("T")
BATCH_ROWS = 256  # conversations or documents handed to the tokenizer at once
_ALONE_BATCHES = 8  # below this, starting processes costs more than it saves
_MAX_PROCESSES = 32
_function: Callable[[list], Sequence] | None = None


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_batches(function: Callable[[list], Sequence[T]], rows: Iterable[Any]) -> Iterator[T]:
    """The results of `function` (a batch of rows -> one result per row) in the order of the rows.

    Forks processes for more than a few batches, where the platform can fork and has cores. Rows are read a bounded
    number of batches ahead. What reading or `function` raises is raised here; a killed process is a UserError.
    """
    rows = iter(rows)
    batches = iter(lambda: list(islice(rows, BATCH_ROWS)), [])
    head = list(islice(batches, _ALONE_BATCHES))
    processes = min(usable_cores(), _MAX_PROCESSES)
    # Linux only: macOS can fork, but its system libraries may not be used afterwards
    if len(head) < _ALONE_BATCHES or processes < 2 or sys.platform != "linux":
        for batch in chain(head, batches):
            yield from function(batch)
        return
    context = multiprocessing.get_context("fork")
    # `function` reaches the processes by the fork itself: tokenizers and templates need no pickling
    executor = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(function, os.getpid()))
    waiting: deque[Future] = deque()
    try:
        for batch in chain(head, batches):
            waiting.append(executor.submit(_run, batch))
            if len(waiting) > 2 * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenising process was killed, perhaps for lack of host memory. Start again on a machine with more"
            " memory, or with fewer cores (taskset -c 0-3 ...)."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start(function: Callable[[list], Sequence], parent: int) -> None:
    global _function
    _function = function
    # one process per core already: threads inside the tokenizer would fight, and warn about the fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    # The file lock of the cache is inherited: were the parent killed, an orphan would hold it for ever.
    if not signal_on_parent_death(signal.SIGKILL, parent):
        os._exit(1)


def _run(batch: list) -> Sequence:
    assert _function is not None
    return _function(batch)
