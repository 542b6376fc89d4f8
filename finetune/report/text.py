"""Numbers as people read them: bytes, seconds, counted things. Torch-free."""

from __future__ import annotations


def count(number: float, noun: str, plural: str = "s") -> str:
    """`1 row`, `2,000 rows`, `1.5 epochs`; `plural` is what the noun takes when there is not exactly one."""
    said = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{said} {noun}{'' if number == 1 else plural}"


def human_bytes(count: float) -> str:
    """`1.5 GiB` and the like."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def human_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
