"""Secrets taken out of everything that is written or said: logs, run.json, recipe.yaml, manifests, messages and
tracebacks.

Known as secret are the values of environment variables that are named like one, what stands before the @ of a URL,
parameters of a URL that are named like one, and the tokens of the usual services by their shape. What a library prints
past us is not ours to change."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
SHORTEST = 8  # characters: `1` or `false` in HF_HUB_DISABLE_IMPLICIT_TOKEN is no secret
_NAMES = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(?:^|_)KEY|KEY_ID)$", re.IGNORECASE)
_PATTERNS = (
    # once a path has been made absolute, one slash is left of two
    (re.compile(r"(\w:/{1,3})[^\s/'\"<>]+@"), rf"\1{MASK}@"),
    (
        re.compile(
            r"([?&][\w.-]*(?:token|secret|password|passwd|key|signature|sig|credential)=)[^&\s'\"<>]+", re.IGNORECASE
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"(\b(?:bearer|authorization:\s*\w+)\s+)[\w.~+/=-]{16,}", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(?<![A-Za-z0-9])(?:hf_|api_org_)[A-Za-z0-9]{30,}"), MASK),  # Hugging Face
    (re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_|github_pat_|glpat-)[\w-]{16,}"), MASK),
    (re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"), MASK),  # AWS
    (re.compile(r"(?<![A-Za-z0-9])xox[abprs]-[\w-]{16,}"), MASK),
    (re.compile(r"(?<![A-Za-z0-9])sk-(?:[a-z]+\d*-){0,2}(?=\w*\d)\w{20,}[\w-]*"), MASK),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL), MASK),
)


def text(said: str, environment: Mapping[str, str] = os.environ) -> str:
    """`said` with `***` in the place of every secret."""
    for value in _values(environment):
        said = said.replace(value, MASK)
    for pattern, replacement in _PATTERNS:
        said = pattern.sub(replacement, said)
    return said


def tree(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """The same for every text in dictionaries, lists and tuples; names in dictionaries, which are ours, and other
    values as they are.
    """
    if isinstance(value, str):
        return text(value, environment)
    if isinstance(value, dict):
        return {key: tree(item, environment) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(tree(item, environment) for item in value)
    return value


def _values(environment: Mapping[str, str]) -> list[str]:
    """Secrets in the environment, the longest first: one may be part of another."""
    found = {value for name, value in environment.items() if _NAMES.search(name) and len(value) >= SHORTEST}
    return sorted((v for v in found if not os.path.exists(v)), key=len, reverse=True)  # a key's file is no key
