"""`accelerate launch` as `finetune train` starts it: records which ranks died, and prints no traceback of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from finetune.process.heartbeat import SHARED_FOLDER


def main() -> None:
    """Launch what the command line says. Ends with 1 when a rank failed, as accelerate does."""
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch.main()
    except ChildFailedError as error:
        _leave({rank: (failure.pid, failure.exitcode) for rank, failure in error.failures.items()})
    except subprocess.CalledProcessError as error:
        _leave({0: (0, error.returncode)})
    except SignalException:
        sys.exit(1)


def _leave(failures: dict[int, tuple[int, int]]) -> None:
    for rank, (pid, status) in failures.items():
        document = {"rank": rank, "pid": pid, "status": status, "time": time.time()}
        (Path(os.environ[SHARED_FOLDER]) / f"died-{rank}.json").write_text(json.dumps(document))
    sys.exit(1)


if __name__ == "__main__":
    main()
