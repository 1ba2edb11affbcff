# pyright: basic, reportMissingImports=false
"""SGLang's whole engine on the CPU with a small model of random weights, run by SGLang's own Python:

    python sglang_engine.py MODEL_DIRECTORY BACKEND PROMPT_TOKENS [--kvfs WHERE] [--layout LAYOUT] [--between COMMAND]

BACKEND is `none`, `kvfs` (at WHERE) or one of SGLang's for its third cache level. The model is made if it is not there.
Generates four tokens after a fixed prompt; with COMMAND, runs that and does the same with another prompt. Prints one line of
JSON per prompt, as test_sglang.Generated.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

PAGE_SIZE = 64


def make_model(directory: Path) -> None:
    """Weights so large that what is in the cache decides the tokens: with small ones a cache of zeros gives the same."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        architectures=["Qwen2ForCausalLM"],
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("backend")
    parser.add_argument("tokens", type=int)
    parser.add_argument("--kvfs")
    parser.add_argument("--layout", default="page_first_direct")
    parser.add_argument("--between")
    arguments = parser.parse_args()
    directory, backend = arguments.directory, arguments.backend
    if not (directory / "model.safetensors").exists():
        make_model(directory)
    import sglang

    options: dict[str, Any] = {
        "model_path": str(directory),
        "device": "cpu",
        "dtype": "bfloat16",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "skip_tokenizer_init": True,
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "max_total_tokens": 8192,
        "mem_fraction_static": 0.2,
        "page_size": PAGE_SIZE,
        "random_seed": 0,
        "log_level": "warning",
    }
    if backend != "none":
        options |= {
            "enable_hierarchical_cache": True,
            "hicache_ratio": 2,
            "hicache_io_backend": "direct",
            "hicache_mem_layout": arguments.layout,
            "hicache_write_policy": "write_through",
            "hicache_storage_backend": "dynamic" if backend == "kvfs" else backend,
            "hicache_storage_prefetch_policy": "wait_complete",
        }
    if backend == "kvfs":
        extra = {
            "backend_name": "kvfs",
            "module_path": "kvfs_usrbio.connectors.sglang",
            "class_name": "KvfsHiCache",
            "interface_v1": 1,
            "allocator": "shm",
            "kvfs": arguments.kvfs,
        }
        options["hicache_storage_backend_extra_config"] = json.dumps(extra)
    engine = sglang.Engine(**options)
    try:
        rng = random.Random(1)
        for number in range(2 if arguments.between else 1):
            if number:
                subprocess.run(arguments.between, shell=True, check=True, timeout=120)
            prompt = [rng.randrange(2, 1000) for _ in range(arguments.tokens)]
            begin = time.perf_counter()
            out: Any = engine.generate(
                input_ids=prompt, sampling_params={"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
            )
            seconds = time.perf_counter() - begin
            details = out["meta_info"].get("cached_tokens_details") or {}
            time.sleep(3)  # pages of the prompt are stored behind the answer
            said = {"tokens": out["output_ids"], "from_storage": details.get("storage", 0), "seconds": seconds}
            print(json.dumps(said), flush=True)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
