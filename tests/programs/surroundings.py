"""Run under a launcher: what a rank finds when it starts. Arguments: out.json (the suffix becomes the rank) and any."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil

from finetune.launch.launcher_command import launched_by

found = {
    "environ": dict(os.environ),
    "arguments": sys.argv[2:],
    "path": sys.path[:1],
    "folder": os.getcwd(),
    "launched_by": launched_by(),
    "command": [word for word in psutil.Process().cmdline() if word != "-u"][1:3],  # torchrun's -u: no buffers
    "threads": os.environ["OMP_NUM_THREADS"],
}
Path(sys.argv[1]).with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(found))
