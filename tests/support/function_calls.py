"""When an answer is the expected call of a function: for tests and for the quick start's count."""

from __future__ import annotations

import json


def is_right(answer: str, expected: str) -> bool:
    """Whether both texts are JSON and say the same call."""
    try:
        return json.dumps(json.loads(answer), sort_keys=True) == json.dumps(json.loads(expected), sort_keys=True)
    except json.JSONDecodeError:
        return False
