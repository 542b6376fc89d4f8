"""Rows of chat or text to token rows: `prepare` once, then `collate` rows of `TokenRows` into micro-batches."""

from finetune.data.collate import collate
from finetune.data.prepare import PreparedData, prepare, tokenise
from finetune.data.store import Row, TokenRows
from finetune.data.stream import StreamRows, open_stream

__all__ = ["PreparedData", "Row", "StreamRows", "TokenRows", "collate", "open_stream", "prepare", "tokenise"]
