# pyright: basic, reportMissingImports=false
"""What vLLM's configuration says of the weights and types that decide which bytes KV has."""

from __future__ import annotations

from typing import Any

from kvfs_usrbio.connectors.keys import model_facts, without_paths


def of_model(config: Any) -> dict[str, object]:
    """`config`: a VllmConfig."""
    model = config.model_config
    return {
        "model": model_facts(model.model, model.revision, getattr(model.hf_config, "_commit_hash", None)),
        "weights elsewhere": model.model_weights,  # in an object store; `model` has only the configuration then
        "load_format": config.load_config.load_format,
        "config": without_paths(model.hf_config.to_dict()),
        "dtype": model.dtype,
        "quantization": model.quantization,
        "cache_dtype": config.cache_config.cache_dtype,
    }
