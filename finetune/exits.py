"""How a process of ours ends: one message, one exit status, and a status file for whoever launched us."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from finetune.errors import FinetuneError, UserError

STATUS_FILE = "FINETUNE_STATUS_FILE"  # environment variable: where rank 0 leaves its exit status and message
GRACE_SECONDS = 10.0


def is_launched() -> bool:
    """Whether this process was started by accelerate or torchrun as one rank of a launch."""
    return "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ)


def run_rank(argv: Sequence[str]) -> None:
    """The trainer process: train the recipe in `argv` and exit with DESIGN's status codes. Does not return."""

    def body() -> None:
        if not argv or argv[0].startswith("-"):
            raise UserError(f"train.py: expected a recipe first, found {' '.join(argv) or 'nothing'}. Usage: accelerate"
                            " launch finetune/train.py recipe.yaml [key=value ...]")  # fmt: skip
        from finetune.run import train_in_place

        train_in_place(argv[0], list(argv[1:]))

    sys.exit(guarded(body))


def guarded(body: Callable[[], None]) -> int:
    """Run `body`; returns the exit status. An expected end prints its message last; anything else keeps its traceback."""
    try:
        body()
    except FinetuneError as error:
        return end_with(error.exit_code, str(error))
    except KeyboardInterrupt:
        return end_with(130, "interrupted")
    except Exception:  # noqa: BLE001 - a bug: its traceback is the message, also in the status file
        text = traceback.format_exc()
        write_status(1, text.strip().splitlines()[-1])
        print(text, file=sys.stderr, flush=True)
        return 1
    write_status(0, "")
    return 0


def end_with(code: int, message: str) -> int:
    """Print `message` as this process's last words and return `code`.

    Every rank meets the same bad input. Rank 0 says it; the others give it time, because the launcher kills all ranks as
    soon as one has left, and speak up only when they are still alive, which means that rank 0 has no problem.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        time.sleep(GRACE_SECONDS)
        message = f"[rank {rank}] {message}"
    write_status(code, message)
    print(message, file=sys.stderr, flush=True)
    return code


def write_status(code: int, message: str) -> None:
    """Leave exit status and message for `finetune train`, which handed over the file's path."""
    path = os.environ.get(STATUS_FILE)
    if path and (os.environ.get("RANK", "0") == "0" or code):
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"exit_code": code, "message": message}, file)
        os.replace(temporary, path)
