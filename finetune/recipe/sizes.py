"""Sizes of memory as people write them: `40GiB`, `1.5GB`. Torch-free."""

from __future__ import annotations

import re
from decimal import Decimal

UNITS = {
    f"{letter}{binary}B": (1024 if binary else 1000) ** power
    for power, letter in enumerate("KMGT", start=1)
    for binary in ("", "i")
}
PATTERN = r"[0-9]+(\.[0-9]+)? ?[KMGT]i?B"  # for the recipe's JSON schema
_EXACT = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?) ?(?P<unit>[KMGT]i?B)")
_LOOSE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([kmgt])(i?)(?:b|bytes?)?", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def parse_bytes(size: object) -> int:
    """The bytes of a size such as `40GiB` (40 x 2^30), `40GB` (40 x 10^9), `1.5GB` or `40 GiB`.

    Spelt exactly: whether `40G` or `40gb` means the one or the other is not guessed. Raises ValueError with a sentence
    that names the value and what to write; callers add the place.
    """
    text = str(size).lower() if isinstance(size, bool) else str(size)
    exact = _EXACT.fullmatch(text)
    if exact is None:
        raise ValueError(_why_not(text))
    found = int(Decimal(exact["number"]) * UNITS[exact["unit"]])
    if found < 1:
        raise ValueError(f"{text} is less than one byte; write a size above 0, such as 40GiB.")
    return found


def _why_not(text: str) -> str:
    plain = text.strip()
    if _NUMBER.fullmatch(plain):
        return f"{text} has no unit; {_either(plain, 'G')}."
    if found := _LOOSE.fullmatch(plain):
        number, letter, binary = found.group(1), found.group(2).upper(), found.group(3)
        if binary:
            return f"{text} is not spelt exactly; did you mean {number}{letter}iB?"
        return f"{text} may mean powers of 1024 or of 1000; {_either(number, letter)}."
    if plain.startswith("-") and (_LOOSE.fullmatch(plain[1:]) or _NUMBER.fullmatch(plain[1:])):
        return f"{text} is less than 0; write a size above 0, such as 40GiB."
    return f"{text or repr(text)} is no size; write a number and one of {', '.join(UNITS)}, such as 40GiB or 1.5GB."


def _either(number: str, letter: str) -> str:
    power = "KMGT".index(letter) + 1
    binary, decimal = f"{number} x 2^{10 * power} bytes", f"{number} x 10^{3 * power}"
    return f"write {number}{letter}iB ({binary}) or {number}{letter}B ({decimal})"
