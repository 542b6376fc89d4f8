"""Finished runs with checkpoints of steps 2 and 4, made once per test session by real launches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.support.forked import train
from tests.support.launch import launch_file
from tests.support.tiny_models import small_recipe

COMMON = ("training.max_steps=4", "checkpoint.save_steps=2", "evaluation.eval_steps=2")
LORA = ("lora.r=8", "lora.alpha=16")
KINDS = {
    "plain": (dict(ranks=1), ()),
    "LoRA": (dict(ranks=1), LORA),
    "ZeRO-2": (dict(ranks=2, zero_stage=2), ()),
}


@dataclass
class SavedRuns:
    """Runs by the names of KINDS; each is trained when it is first asked for."""

    folder: Path

    @property
    def recipe(self) -> Path:
        path = self.folder / "job/recipe.yaml"
        return path if path.exists() else small_recipe(self.folder / "job")

    def __getitem__(self, kind: str) -> Path:
        name = kind.replace(" ", "_")
        output, (layout, overrides) = self.folder / name, KINDS[kind]
        if not output.exists():
            file = launch_file(self.folder / f"{name}.yaml", **layout)
            done = train(file, self.recipe, *COMMON, *overrides, f"output_dir={output}", env=self.cache)
            assert done.returncode == 0, done.stderr[-4000:]
        return output

    @property
    def cache(self) -> dict[str, str]:
        return {"FINETUNE_CACHE": str(self.folder / "cache")}
