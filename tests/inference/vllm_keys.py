# pyright: basic, reportMissingImports=false
"""What kvfs's connectors for vLLM know of a model, run by vLLM's own Python:

    python vllm_keys.py MODEL_DIRECTORY

Prints one line of JSON: for each case a fingerprint, or why it is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from kvfs_usrbio.connectors.keys import fingerprint
from kvfs_usrbio.connectors.vllm import connector, tier

LAYERS = 7


def engine(model: str, *, load_format: str = "auto", elsewhere: str = "", lora: Any = None, stages: int = 1) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=model,
            revision=None,
            model_weights=elsewhere,
            hf_config=SimpleNamespace(to_dict=lambda: {"_name_or_path": model, "layers": LAYERS}),
            dtype="bfloat16",
            quantization=None,
            get_total_num_hidden_layers=lambda: LAYERS,
        ),
        load_config=SimpleNamespace(load_format=load_format),
        cache_config=SimpleNamespace(cache_dtype="auto", prefix_caching_hash_algo="sha256"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=stages),
        speculative_config=None,
        lora_config=lora,
    )


def rank(config: Any, layers: int) -> list[Any]:
    """As the process sees it whose stage has so many layers."""
    group = SimpleNamespace(kv_cache_spec="spec", layer_names=[str(i) for i in range(layers)])
    stages = connector._stages(config, group)
    facts = connector._facts(config, SimpleNamespace(kv_cache_layout="", kv_tp_replicas=1), group, stages, "")
    return [stages, fingerprint(facts).hex()]


def said(call: Callable[[], dict[str, object]]) -> str:
    try:
        return fingerprint(call()).hex()
    except ValueError as error:
        return str(error)


def main() -> None:
    model = sys.argv[1]
    connector._cpu_layout = lambda config, spec: ""
    configurations = {
        "plain": engine(model),
        "dummy": engine(model, load_format="dummy"),
        "object store": engine(model, elsewhere="s3://bucket/model"),
        "adapters": engine(model, lora=object()),
    }
    found: dict[str, Any] = {}
    for name, config in configurations.items():
        tier.get_current_vllm_config_or_none = lambda config=config: config
        found[name] = said(lambda: tier._of_model(model, None))
    tier.get_current_vllm_config_or_none = lambda: None
    found["local"] = said(lambda: tier._of_model(model, None))
    found["hub"] = said(lambda: tier._of_model("acme/llama", None))
    found["hub with version"] = said(lambda: tier._of_model("acme/llama", "1"))
    found["stages"] = [rank(engine(model, stages=3), layers) for layers in (2, 3, 2)]
    found["other stages"] = rank(engine(model, stages=2), 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
