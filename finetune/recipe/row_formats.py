"""The formats of a row and the columns of each: what `format` and `columns` of a source may name."""

from __future__ import annotations

# format -> (columns it needs, columns it also reads); auto takes the first whose needed columns are all there.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "preference": (("chosen", "rejected"), ("messages", "conversations", "prompt", "system", "tools")),
    "messages": (("messages",), ("system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "prompt_completion": (("prompt", "completion"), ("system", "tools")),
    "text": (("text",), ()),
}
COLUMNS = tuple(dict.fromkeys(name for needed, more in FORMATS.values() for name in (*needed, *more)))
