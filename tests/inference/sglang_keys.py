# pyright: basic, reportMissingImports=false
"""Keys of KvfsHiCache under published arguments of SGLang, run by SGLang's own Python:

    python sglang_keys.py WHERE MODEL [MODEL...]

Prints one line of JSON: for each case its key for the same page, or why it is refused. The cases are MODEL alone, the first of
them with other arguments, and `none` where SGLang has published nothing.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.runtime_context import get_context
from sglang.srt.server_args import ServerArgs

from kvfs_usrbio.connectors.sglang import KvfsHiCache

CASES: dict[str, dict[str, Any]] = {
    "fp8_e4m3": {"kv_cache_dtype": "fp8_e4m3"},
    "fp8_e5m2": {"kv_cache_dtype": "fp8_e5m2"},
    "rope": {"json_model_override_args": '{"rope_theta": 5000}'},
    "dummy": {"load_format": "dummy"},
    "float32": {"dtype": "float32"},
    "fp8": {"quantization": "fp8"},
    "lora": {"enable_lora": True},
    "adapters": {"lora_paths": ["/adapters/a"]},
}


def key(where: str, name: str, version: str | None = None) -> str:
    extra = {"kvfs": where, "interface_v1": 1, "model_version": version}
    config = HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, True, name, extra_config=extra)
    try:
        cache = KvfsHiCache(config)
    except ValueError as error:
        return str(error)
    try:
        return cache._keys(PoolName.KV.value, False, {"type": "torch.uint8"}).of(b"page").hex()
    finally:
        cache.close()


def published(where: str, name: str, arguments: dict[str, Any]) -> str:
    with ExitStack() as stack:
        context = get_context()
        context.set_server_args(ServerArgs(model_path=name, device="cpu"))
        for option, value in arguments.items():
            bag = context.config_bag("lora" if "lora" in option else "model")
            stack.callback(bag._set, option, getattr(bag, option))
            bag._set(option, value)
        return key(where, name)


def main() -> None:
    where, *models = sys.argv[1:]
    found = {"none": key(where, models[0]), "tagged": key(where, models[0] + "-unified-token-major")}
    found["version"] = key(where, models[0], "2")
    found |= {model: published(where, model, {}) for model in models}
    found |= {case: published(where, models[0], arguments) for case, arguments in CASES.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
