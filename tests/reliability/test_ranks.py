"""One rank of two raises, dies, leaves or hangs: the job ends soon, and its last words are the first cause, with rank,
step and rows.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import pytest

from tests.support.launch import accelerate, launch_file, program, run
from tests.support.tiny_models import small_recipe

pytestmark = pytest.mark.slow

BROKEN = program("broken_train")
WINDOW = 3
PLACE = (
    rf"rank 1, window {WINDOW} \(after step {WINDOW - 1}\), micro-batch 1 of \d, rows \d+(?:, \d+)* \(1 x \d+ tokens\)"
)
TIMEOUT_SECONDS = 6
NO_PROGRESS = PLACE + r": no progress for \d+ s; "


@dataclass(frozen=True)
class Case:
    """How rank 1 breaks under which launcher and engine; the exit status and last words that must come of it."""

    how: str
    launcher: str
    zero_stage: int
    code: int
    last: str
    tracebacks: int = 0


CASES = {
    "an exception": Case("raise", "finetune train", 2, 1, rf"RuntimeError: boom \({PLACE}\)", 1),
    "SIGKILL": Case(
        "kill",
        "finetune train",
        0,
        128 + signal.SIGKILL,
        PLACE + r": killed by SIGKILL, (possibly|probably) by the out-of-memory killer "
        r"\(host memory limit: [\d.,]+ GiB \(.+\)\)\.",
    ),
    "leaving": Case(
        "exit",
        "accelerate launch",
        0,
        1,
        PLACE + r" \(pid \d+\): disappeared \(killed or crashed\); detected by rank 0, .+",
    ),
    "hanging": Case("hang", "finetune train", 2, 1, NO_PROGRESS + r"stuck in break_down \(broken_train\.py:\d+\)\..+"),
    "hanging, accelerate": Case(
        "hang", "accelerate launch", 0, 1, NO_PROGRESS + r"stuck in break_down \(broken_train\.py:\d+\)\..+"
    ),
    "a process that stands still": Case("stop", "finetune train", 0, 1, NO_PROGRESS + r"rank 0 waits for it\..+"),
    "an exception that rank 0 never hears of": Case(
        "deaf", "finetune train", 0, 1, rf"RuntimeError: boom \({PLACE}\)", 1
    ),
}


@dataclass(frozen=True)
class Ended:
    """What a broken run left."""

    code: int
    printed: str
    seconds: float  # from the last step to the end
    document: dict


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, Ended]:
    """Every case, two at a time."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe = small_recipe(folder)

    def one(number: int, case: Case) -> Ended:
        output = folder / f"run-{number}"
        config = launch_file(folder / f"launch-{number}.yaml", 2, zero_stage=case.zero_stage)
        timeout = 0 if case.how == "deaf" else TIMEOUT_SECONDS
        arguments = [
            *BROKEN,
            case.how,
            str(WINDOW),
            config,
            recipe,
            f"training.step_timeout_seconds={timeout}",
            "evaluation.eval_steps=100",
            f"output_dir={output}",
        ]
        env = {"FINETUNE_CACHE": str(folder / "cache")}
        if case.launcher == "finetune train":
            done = run([sys.executable, *arguments], env=env, timeout=300)
        else:
            done = accelerate(config, *arguments, env=env, timeout=300)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return Ended(
            done.returncode, done.stderr, time.time() - rows[-1]["time"], json.loads((output / "run.json").read_text())
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(one, range(len(CASES)), CASES.values()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_first_cause_has_the_last_word_once(name, ended):
    case, end = CASES[name], ended[name]
    ours = end.printed.split("ChildFailedError")[0]  # accelerate launch adds a report of its own, after our last word
    assert end.code == case.code, end.printed[-3000:]
    found = [match[0] for match in re.finditer(rf"^{case.last}$", ours, re.MULTILINE)]
    assert len(found) == 1, end.printed[-3000:]
    if case.launcher == "finetune train":
        assert end.printed.rstrip().endswith(found[0]), end.printed[-3000:]
    assert (
        ours.split("accelerate/commands/launch.py")[0].count("Traceback (most recent call last)")
        - (case.launcher == "accelerate launch")
        == case.tracebacks
    ), "a bug keeps its traceback, and what follows from it has none"


@pytest.mark.parametrize("name", CASES)
def test_it_ends_soon(name, ended):
    assert ended[name].seconds < 60, "the step timeout is 6 s, a rank waits 5 s longer and 10 s for the others' words"


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].how != "deaf"])
def test_run_json_says_the_same(name, ended):
    document = ended[name].document
    assert (document["status"], document["exit_code"]) == ("failed", 1)
    assert re.match(PLACE if CASES[name].how != "raise" else rf"RuntimeError: boom \({PLACE}\)", document["message"])


def test_no_process_is_left(ended):
    left = [p for p in psutil.process_iter() if any("broken_train.py" in part for part in _command(p))]
    assert not left


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
