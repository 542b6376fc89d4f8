"""The end of every command's first stage: from here on torch is loaded."""

from __future__ import annotations


def load_libraries(use_cpu: bool = False, deterministic: bool = False) -> None:
    """Load torch and prepare the other libraries for import; a command's late import comes next.

    What a command can answer without torch, it has answered before.
    """
    from finetune.engine.libraries import prepare_libraries

    prepare_libraries(use_cpu, deterministic)
