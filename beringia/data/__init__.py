"""What a run learns from: tokenizer files, checkable tasks, packed token shards, chats, and the stream of samples.

Reads folders of text and chats, writes packed shards and tokenizer directories. Does not import transformers.
"""

from __future__ import annotations

from beringia.data.stream import Batch, Stream, open_stream
from beringia.data.tasks import Split, Task, make_task
from beringia.data.tokenizer import Tokenizer, check_vocabulary, choose_tokenizer, load_tokenizer, write_tokenizer

__all__ = [
    "Batch",
    "Split",
    "Stream",
    "Task",
    "Tokenizer",
    "check_vocabulary",
    "choose_tokenizer",
    "load_tokenizer",
    "make_task",
    "open_stream",
    "write_tokenizer",
]
