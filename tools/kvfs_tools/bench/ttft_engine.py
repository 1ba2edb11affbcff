# pyright: basic, reportMissingImports=false
"""One vLLM engine process of `kvfs bench ttft`, run by the Python of vLLM's environment:

    python ttft_engine.py ORDER

ORDER: JSON, as ttft.Order. The last line of the output is JSON, as ttft.Measured.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": f"{min(os.sched_getaffinity(0))}-{max(os.sched_getaffinity(0))}",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def make_model(directory: Path, shape: dict[str, int]) -> None:
    """A model of this shape with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=1024,
        max_position_embeddings=32768,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        architectures=["Qwen2ForCausalLM"],
        **shape,
    )
    torch.manual_seed(0)
    made = directory.with_name(directory.name + ".part")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(made)
    made.rename(directory)


def mend_dispatcher() -> None:
    """vLLM 0.32 looks through the variables of every module that is loaded, and of numba's, which LMCache loads, one has none."""
    import builtins

    import vllm.triton_utils.dispatcher as dispatcher

    def variables(what: Any) -> dict[str, Any]:
        found = builtins.vars(what)
        return found if isinstance(found, dict) else {}

    dispatcher.vars = variables


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    order = json.loads(sys.argv[1])
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    model = Path(order["model"])
    if not model.exists():
        make_model(model, order["shape"])
    if order["transfer"] is not None and "LMCache" in order["transfer"]["kv_connector"]:
        mend_dispatcher()
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    options: dict[str, Any] = {}
    if order["transfer"] is not None:
        options["kv_transfer_config"] = KVTransferConfig(**order["transfer"])
    prompts = order["prompts"]
    llm = LLM(
        model=str(model),
        dtype="bfloat16",
        max_model_len=max(map(sum, prompts)) + 64,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        seed=0,
        **options,
    )

    def tokens(seed: object, count: int) -> list[int]:
        source = random.Random(str(seed))
        return [source.randrange(2, 1000) for _ in range(count)]

    def generate(batch: list[list[int]]) -> list[Any]:
        how = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        return llm.generate([{"prompt_token_ids": one} for one in batch], how, use_tqdm=False)

    generate([tokens("warm up", 40)])
    made = [tokens(f"context {order['seed']} {i}", context) for i, (context, _) in enumerate(prompts)]
    if order["questions"]:
        batch = [
            context + tokens(f"question {order['seed']} {i} {q}", rest)
            for i, (context, (_, rest)) in enumerate(zip(made, prompts, strict=True))
            for q in range(order["questions"])
        ]
    else:
        batch = [
            context + tokens(f"rest {order['seed']} {i}", rest)
            for i, (context, (_, rest)) in enumerate(zip(made, prompts, strict=True))
        ]
    trace = order["trace"]
    skip = Path(trace).stat().st_size if trace and Path(trace).exists() else 0
    begun, cpu = time.perf_counter(), cpu_seconds()
    outputs = generate(batch)
    seconds, cpu = time.perf_counter() - begun, cpu_seconds() - cpu
    events: list[dict[str, Any]] = []
    if trace and Path(trace).exists():
        with open(trace) as lines:
            lines.seek(skip)
            events = [json.loads(line) for line in lines]

    def total(what: str, field: str) -> float:
        return sum(event.get(field) or 0 for event in events if event["what"] == what)

    llm.llm_engine.engine_core.shutdown()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu": cpu,
                "cached": sum(output.num_cached_tokens or 0 for output in outputs),
                "tokens": [output.outputs[0].token_ids[0] for output in outputs],
                "exists": total("exists", "seconds"),
                "load": total("load", "seconds"),
                "get": total("load", "get"),
                "copy": total("load", "copy"),
                "bytes": total("load", "bytes"),
                "blocks": total("load", "blocks"),
                "save": total("save", "copy"),
                "forward": total("step", "forward"),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
