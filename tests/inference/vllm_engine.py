# pyright: basic, reportMissingImports=false
"""A vLLM engine on the CPU that takes orders, run by vLLM's own Python:

    python vllm_engine.py MODEL_DIRECTORY OPTIONS

The model is made if it is not there. OPTIONS: JSON, arguments of vllm.LLM. An order is one line of JSON on standard input, its
answer one on the standard output that the process was started with; everything else is printed to standard error.

    {"prompts": [[token, ...], ...], "tokens": N, "together": bool, "abort": [index, ...]}
        -> {"outputs": [{"tokens": [...], "cached": N} or null where aborted], "seconds": S}
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": f"{min(os.sched_getaffinity(0))}-{max(os.sched_getaffinity(0))}",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: it starts in half the time
}
SHAPES = {  # hidden, layers, heads, heads of K and V, inner
    "tiny": (256, 4, 4, 2, 512),
    "small": (896, 24, 14, 2, 4864),  # Qwen2.5-0.5B's
}


def make_model(directory: Path, shape: str = "tiny") -> None:
    """Weights so large that what is in the cache decides the tokens: with vLLM's dummy ones a cache of zeros gives the same."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    hidden, layers, heads, kv_heads, inner = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        architectures=["Qwen2ForCausalLM"],
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


def generate(llm: Any, order: dict[str, Any]) -> list[dict[str, Any] | None]:
    from vllm import SamplingParams

    how = SamplingParams(max_tokens=order["tokens"], temperature=0, ignore_eos=True, detokenize=False)
    engine = llm.llm_engine
    prompts = order["prompts"]
    outputs: list[dict[str, Any] | None] = [None] * len(prompts)
    groups = [range(len(prompts))] if order.get("together") else [range(i, i + 1) for i in range(len(prompts))]
    for group in groups:
        names = {f"{time.monotonic_ns()}-{i}": i for i in group}
        for name, i in names.items():
            engine.add_request(name, {"prompt_token_ids": prompts[i]}, how)
        aborted = [name for name, i in names.items() if i in order.get("abort", [])]
        steps = 0
        while engine.has_unfinished_requests():
            for done in engine.step():
                if done.finished:
                    tokens = list(done.outputs[0].token_ids)
                    outputs[names[done.request_id]] = {"tokens": tokens, "cached": done.num_cached_tokens or 0}
            steps += 1
            if steps == 2 and aborted:
                engine.abort_request(aborted)
    return outputs


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    model = Path(sys.argv[1])
    options = json.loads(sys.argv[2])
    if not model.exists():
        make_model(model, options.pop("shape", "tiny"))
    options.pop("shape", None)
    mend_dispatcher()
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = options.pop("kv_transfer_config", None)
    if transfer is not None:
        options["kv_transfer_config"] = KVTransferConfig(**transfer)
    llm = LLM(
        **{
            "model": str(model),
            "dtype": "bfloat16",
            "max_model_len": 4096,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "enable_prefix_caching": False,  # so that every hit comes from kvfs
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "seed": 0,
            **options,
        }
    )
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        begun = time.perf_counter()
        outputs = generate(llm, json.loads(line))
        answers.write(json.dumps({"outputs": outputs, "seconds": time.perf_counter() - begun}) + "\n")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
