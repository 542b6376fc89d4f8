"""What ends a run on purpose: one exception per exit status (docs: exit codes in README.md)."""

from __future__ import annotations

from collections.abc import Sequence


class FinetuneError(Exception):
    """A run that ends with a message instead of a traceback. `exit_code` is the process's exit status."""

    exit_code = 1
    alone = False  # whether this rank alone is in trouble: what all ranks meet is rank 0's to say


class UserError(FinetuneError):
    """Something the user can mend: bad input, a launch that does not fit. One message per problem, all at once.

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
    """A signal or a STOP file asked for it; the state was saved, and the same command goes on."""

    exit_code = 3


class Diverged(FinetuneError):
    """Training left the finite numbers, or a verification failed. Nothing non-finite was written."""

    exit_code = 4
