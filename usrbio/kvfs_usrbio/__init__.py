"""kvfs for engines: KV blocks over shared-memory rings, without a system call or a copy on the way."""

from kvfs_usrbio.blocks import MISS, BlockStore
from kvfs_usrbio.client import Buffer, ForkError

__all__ = ["MISS", "BlockStore", "Buffer", "ForkError"]
