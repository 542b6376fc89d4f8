"""What lies in a trained folder: a full model, or an adapter and the name of its base. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.report.run_folder import read_json

BASE_FILE = "finetune_base.json"  # beside an adapter: how its frozen base was held while it was trained


@dataclass(frozen=True)
class Trained:
    """What lies in a folder (or under a hub id). `base` and `held` say what an adapter sits on, and how it was held."""

    name: str
    adapter: bool
    base: str
    revision: str | None
    held: dict[str, Any]


def find(name: str) -> Trained:
    """The model or adapter called `name`: a folder, else a hub id. Raises UserError when there is neither."""
    folder = Path(name).expanduser()
    if (adapter := read_json(folder / "adapter_config.json")) is not None:
        held = read_json(folder / BASE_FILE) or {}
        return Trained(str(folder), True, adapter["base_model_name_or_path"], adapter.get("revision"), held)
    if (folder / "config.json").exists():
        return Trained(str(folder), False, str(folder), None, {})
    if folder.is_dir():
        inside = folder / "model"
        hint = f"Did you mean {inside}?" if inside.is_dir() else "Give a run's model folder, such as runs/x/model."
        raise UserError(f"{name}: holds neither config.json nor adapter_config.json. {hint}")
    if folder.exists() or name[:1] in "./~" or name.count("/") > 1:
        raise UserError(f"{name}: no such model folder. Give a run's model folder, such as runs/x/model, or a hub id.")
    return Trained(name, False, name, None, {})
