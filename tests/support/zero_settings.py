"""DeepSpeed's buffer sizes, read back from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def filled_in(zero_optimization: Mapping[str, Any]) -> dict[str, int]:
    """The settings of `derive_settings` that a DeepSpeed section holds: what `fill_in` wrote, read back."""
    flat = {
        f"{section}.{name}": value
        for section in ("offload_optimizer", "offload_param")
        for name, value in (zero_optimization.get(section) or {}).items()
    }
    return {key: value for key, value in (dict(zero_optimization) | flat).items() if isinstance(value, int)}
