"""One DeepSpeed version under one launch file; started by scripts/deepspeed_versions.py through `accelerate launch`.

Arguments: recipe.yaml out.json. Rank 0 writes what `finetune verify` says, what the start-up check says, and what four AdamW steps
come to without that check: once as this project's engine accumulates, once with accelerate's own `accumulate()`. A crash is a
result too: it is written down, and the next part starts afresh.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests" / "launched")]

import torch
from exactness import ADAMW, PER_DEVICE_ROWS, Case, run_case

from finetune import launch, verify
from finetune.backend.engine import Engine
from finetune.backend.parents import launched_by
from finetune.backend.probe import prepare_libraries
from finetune.backend.selfcheck import check_scale
from finetune.errors import Diverged, UserError
from finetune.exits import REPORT_FILE

K = 4
WINDOWS = (PER_DEVICE_ROWS * K * 2,) * 4  # rows of four windows on two ranks
OURS = Engine.micro_step


def with_accumulate(self, batch, denominator, last):
    """A micro-batch as accelerate's documentation has it: its `accumulate()` counts to K, and may enter DeepSpeed's no_sync."""
    with self.accelerator.accumulate(self.module):
        assert self.accelerator.sync_gradients == last
        summed_loss = self.module(batch)
        self.accelerator.backward(summed_loss * (self.ranks * K / denominator))
    if last:
        self._end_window()
    return summed_loss.detach()


def accumulated(recipe: str, strategy, micro_step) -> dict:
    """Four AdamW steps without a start-up check: weights against four big batches, gradient norms over the true ones."""
    Engine.micro_step = micro_step
    try:
        case = run_case(Case("AdamW", ADAMW, windows=WINDOWS), recipe, strategy)
    finally:
        Engine.micro_step = OURS
    if not case:  # not rank 0
        return {}
    ratios = [window["norm_ratio"] for window in case["windows_run"]]
    return {"weight_difference": case["weight_difference"], "norm_ratios": ratios}


def checked(strategy) -> dict:
    """What the start-up check says."""
    try:
        return {"caught": False, "said": check_scale(strategy, K, PER_DEVICE_ROWS, 1.0, print)}
    except UserError as error:
        return {"caught": True, "said": str(error)}


def verified(recipe: str, folder: Path) -> dict:
    """What `finetune verify` says in this launch, with K = 4 too."""
    report, status, said = folder / "verify.json", 0, ""
    os.environ[REPORT_FILE] = str(report)
    rows = (f"training.per_device_train_batch_size={PER_DEVICE_ROWS}", f"training.global_batch_size={WINDOWS[0]}")
    try:
        verify.verify(recipe, rows, False, True)
    except (Diverged, UserError) as error:
        status, said = error.exit_code, str(error)
    cases = json.loads(report.read_text())["cases"] if report.exists() else []
    return {"caught": status != 0, "exit_status": status, "said": said, "cases": cases}


def attempt(part: Callable[[], dict]) -> dict:
    """The part's result, or how it crashed."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations import unset_hf_deepspeed_config

    try:
        return part()
    except Exception as error:  # noqa: BLE001 - old versions fail in many ways, and that is what is measured
        traceback.print_exc()
        return {"caught": True, "crash": f"{type(error).__name__}: {error}".partition("\n")[0]}
    finally:
        AcceleratorState._reset_state()  # also after a crash the next part gets an engine of its own
        GradientState._reset_state()
        unset_hf_deepspeed_config()


def main() -> None:
    recipe, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    prepare_libraries()
    strategy = launch.from_environment(os.environ, launched_by()[1])
    import deepspeed

    found = {"deepspeed": deepspeed.__version__, "file": deepspeed.__file__}
    parts = {"verify": lambda: verified(recipe, out.parent),  # first, as in real life: before there is a process group
             "selfcheck": lambda: checked(strategy),
             "ours": lambda: accumulated(recipe, strategy, OURS),
             "accumulate": lambda: accumulated(recipe, strategy, with_accumulate)}  # fmt: skip
    for name, part in parts.items():
        found[name] = attempt(part)
        if int(os.environ.get("RANK", "0")) == 0:
            out.write_text(json.dumps(found))


main()
