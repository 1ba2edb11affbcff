"""kvfs for vLLM: `--kv-transfer-config '{"kv_connector": "KvfsConnector", "kv_connector_module_path":
"kvfs_usrbio.connectors.vllm", "kv_role": "kv_both", ...}'`. `kvfs connectors` prints all of it, docs/engines.md explains it.

Only KvfsConnector needs vLLM, which is imported when it is asked for.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KvfsConnector"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name != "KvfsConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvfs_usrbio.connectors.vllm.connector import KvfsConnector

    return KvfsConnector
