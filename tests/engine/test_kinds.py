"""Every kind of engine is a module with the same functions."""

from __future__ import annotations

import inspect

from finetune.engine.kinds import KINDS


def functions_of(module) -> dict[str, inspect.Signature]:
    """Signature and docstring of the functions that a module defines for others."""
    return {
        name: (inspect.signature(value), bool(value.__doc__))
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def test_kinds_have_the_same_functions_with_the_same_signatures():
    native, *others = set(KINDS.values())
    assert len(functions_of(native)) >= 12
    for kind in others:
        assert functions_of(kind) == functions_of(native), kind


def test_every_engine_of_a_strategy_has_a_kind():
    assert set(KINDS) == {"single", "ddp", "deepspeed"}
