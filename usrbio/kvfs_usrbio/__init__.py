"""kvfs for engines: KV blocks over shared-memory rings, without a system call or a copy on the way."""

from kvfs_usrbio.blocks import MISS, BlockStore, ScanEntry
from kvfs_usrbio.client import Buffer, ForkError
from kvfs_usrbio.files import File
from kvfs_usrbio.queue import Operation, Queue

__all__ = ["MISS", "BlockStore", "Buffer", "File", "ForkError", "Operation", "Queue", "ScanEntry"]
