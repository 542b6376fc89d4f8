"""Rows of chat or text to token rows: `prepare` once, then `collate` rows of `TokenRows` into micro-batches."""

from finetune.data.collate import collate
from finetune.data.prepare import PreparedData, prepare, tokenise
from finetune.data.store import Row, TokenRows

__all__ = ["PreparedData", "Row", "TokenRows", "collate", "prepare", "tokenise"]
