"""Run under a launcher: the start-up check as it is, then with one factor of the engine's scale broken at a time.

Argument: out.json, a map from what was broken ("" for nothing) to what the check said.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from finetune.engine.engine import Engine
from finetune.engine.libraries import prepare_libraries
from finetune.engine.scale_check import check_scale, start_probe_engine
from finetune.engine.settings import EngineSettings
from finetune.errors import UserError
from finetune.launch.environment import from_environment
from finetune.launch.launcher_command import launched_by

right_step = Engine.micro_step


def forgets_world(self, batch, denominator, last):
    return right_step(self, batch, denominator * self.ranks, last)


def forgets_k(self, batch, denominator, last):
    return right_step(self, batch, denominator * self.accelerator.gradient_accumulation_steps, last)


def own_token_count(self, batch, denominator, last):
    """Each micro-batch divided by its own tokens: the mean of means."""
    return right_step(self, batch, max(1, batch.trained_tokens) * self.ranks, last)


def loses_all_but_the_last(self, batch, denominator, last):
    return right_step(self, batch, denominator, last) if last else torch.zeros(())


def steps_every_time(self, batch, denominator, last):
    return right_step(self, batch, denominator, True)


BROKEN = {f.__name__: f for f in (forgets_world, forgets_k, own_token_count, loses_all_but_the_last, steps_every_time)}


def main() -> None:
    torch.set_num_threads(1)
    prepare_libraries()
    strategy = from_environment(os.environ, launched_by()[1])
    found = {}
    for name, step in {"": right_step, **BROKEN, "again": right_step}.items():
        Engine.micro_step = step
        try:
            found[name] = check_scale(start_probe_engine(EngineSettings(strategy, 4, 2, 1.0)))
        except UserError as error:
            found[name] = str(error)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))


main()
