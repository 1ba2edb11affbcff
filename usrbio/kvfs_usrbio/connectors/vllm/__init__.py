"""kvfs for vLLM: `--kv-transfer-config '{"kv_connector": "KvfsConnector", "kv_connector_module_path":
"kvfs_usrbio.connectors.vllm", "kv_role": "kv_both", ...}'`. `kvfs connectors` prints all of it, docs/engines.md explains it.

KvfsTier is the secondary tier for vLLM's OffloadingConnector. Only these two need vLLM, which is imported when one is asked for.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KvfsConnector", "KvfsTier"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "KvfsConnector":
        from kvfs_usrbio.connectors.vllm.connector import KvfsConnector

        return KvfsConnector
    if name == "KvfsTier":
        from kvfs_usrbio.connectors.vllm.tier import KvfsTier

        return KvfsTier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
