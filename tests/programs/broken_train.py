"""The trainer, whose rank 1 breaks in the first forward of a window, under any launcher; without one it is `finetune
train --launch`.

Arguments: how (raise, exit, kill, hang, stop; deaf: it raises, and rank 0 hangs) window launch-file recipe overrides.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from finetune.launch.environment import is_launched
from finetune.process.exit_status import run_guarded

how, window, launch_file, *arguments = sys.argv[1:]


def break_down(rank: str) -> None:
    while how == "hang" or (how == "deaf" and rank == "0"):
        time.sleep(1)
    if how in ("raise", "deaf"):
        raise RuntimeError("boom")
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


if is_launched():
    from finetune.commands.train import run_rank
    from finetune.objectives.sft import SummedLoss
    from finetune.training import step

    seed, forward = step.seed_randomness, SummedLoss.forward
    now = [-1]

    def seed_and_remember(number: int, index: int, micro_batch: int, rank: int) -> None:
        now[0] = index
        seed(number, index, micro_batch, rank)

    def forward_and_break(self, batch):
        if self.training and (os.environ["RANK"] == "1" or how == "deaf") and now[0] + 1 == int(window):
            break_down(os.environ["RANK"])
        return forward(self, batch)

    step.seed_randomness, SummedLoss.forward = seed_and_remember, forward_and_break
    run_rank(arguments)
else:
    from finetune.launch import preflight, start

    strategy = preflight.first_stage(arguments[0], arguments[1:], launch_file).strategy
    sys.exit(run_guarded(lambda: start._launch(strategy, launch_file, [__file__, *sys.argv[1:]], {})))
