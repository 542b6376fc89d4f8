"""How a process of ours ends: one message, one exit status, and a status file for whoever launched us."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

from finetune import redact
from finetune.errors import FinetuneError

STATUS_FILE = "FINETUNE_STATUS_FILE"  # environment variable: where rank 0 leaves its exit status and message
REPORT_FILE = "FINETUNE_REPORT_FILE"  # environment variable: where a launched command leaves what its launcher shall print
GRACE_SECONDS = 10.0
INTERRUPTED = 130  # Ctrl-C: the shell's own convention, 128 + SIGINT


def is_launched() -> bool:
    """Whether this process was started by accelerate or torchrun as one rank of a launch."""
    # accelerate sets the second for every script; people set other ACCELERATE_* variables, such as the log level, themselves
    return "LOCAL_RANK" in os.environ or "ACCELERATE_DYNAMO_BACKEND" in os.environ


def guarded(body: Callable[[], None]) -> int:
    """Run `body`; returns the exit status. An expected end prints its message last; anything else keeps its traceback."""
    try:
        body()
    except FinetuneError as error:
        return end_with(error.exit_code, str(error))
    except KeyboardInterrupt:
        return end_with(INTERRUPTED, "interrupted")
    except Exception:  # noqa: BLE001 - a bug: its traceback is the message
        text = traceback.format_exc().strip()
        return end_with(1, text, for_launcher=text.splitlines()[-1])
    write_status(0, "")
    return 0


def end_with(code: int, message: str, for_launcher: str = "") -> int:
    """Print `message` as this process's last words and return `code`.

    Every rank meets the same bad input, and the others meet a broken connection when only rank 0 does. Rank 0 says what is
    wrong; the others give it time, because the launcher kills all ranks as soon as one has left, and speak up only when
    they are still alive, which means that rank 0 has no problem.
    """
    message, for_launcher = redact.text(message), redact.text(for_launcher)
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        time.sleep(GRACE_SECONDS)
        message = f"[rank {rank}] {message}"
    write_status(code, for_launcher or message)
    print(message, file=sys.stderr, flush=True)
    return code


def write_status(code: int, message: str) -> None:
    """Leave exit status and message for `finetune train`, which handed over the file's path. Rank 0's word stands."""
    path = os.environ.get(STATUS_FILE)
    if path and (os.environ.get("RANK", "0") == "0" or code and not os.path.exists(path)):
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"exit_code": code, "message": message}, file)
        os.replace(temporary, path)
