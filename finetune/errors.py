"""What ends a run on purpose: one exception per exit status."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pickle import UnpicklingError


class FinetuneError(Exception):
    """A run that ends with a message instead of a traceback. `exit_code` is the process's exit status."""

    exit_code = 1
    alone = False  # whether this rank alone is in trouble: what all ranks meet is rank 0's to say


class UserError(FinetuneError):
    """A user error, to be fixed before the next start: bad input, a launch that does not fit. All problems at once.

    `messages` holds one problem per entry, each `where: what was found, what is allowed, what to change`.
    """

    exit_code = 2

    def __init__(self, messages: str | Sequence[str]):
        self.messages = (messages,) if isinstance(messages, str) else tuple(messages)
        super().__init__("\n".join(self.messages))


class OutOfMemory(UserError):
    """This rank's device or host has no memory left."""

    alone = True


class StopRequested(FinetuneError):
    """The run was asked to stop, by a signal or a STOP file; its state was saved, and the same command resumes it."""

    exit_code = 3


class Diverged(FinetuneError):
    """Loss or weights became NaN or infinite, or a verification failed. Nothing non-finite was written."""

    exit_code = 4


def reason(error: Exception) -> str:
    """Why a file could not be read: the first line of a library's error, without torch's advice to trust a pickle."""
    if isinstance(error, UnpicklingError):
        if called := re.search(r"(?:GLOBAL|function:?) (\S+)", str(error)):
            return f"it is a pickle that asks for {called[1]}, and not plain tensors."
        return "it is no file of tensors."
    return next(iter(str(error).splitlines()), type(error).__name__)
