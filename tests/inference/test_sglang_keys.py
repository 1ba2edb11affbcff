"""What tells pages in kvfs apart besides SGLang's own hash: all that decides which bytes they have."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from environments import environment

HERE = Path(__file__).parent
DIFFERENT = ("fp8_e4m3", "fp8_e5m2", "rope", "dummy", "float32", "fp8", "version")
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "torch_dtype": "bfloat16",
}


@pytest.mark.timeout(900)
def test_keys_are_those_of_the_model_and_of_how_it_was_made(tmp_path: Path) -> None:
    models = [tmp_path / name for name in ("one", "copy", "other")]
    for model in models:
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIG))
        (model / "model.bin").write_bytes(bytes(1000))
    (models[2] / "model.bin").write_bytes(b"x" * 1000)
    shims = {"PYTHONPATH": str(HERE.parent / "engines" / "sglang_cpu")}
    done = environment("sglang").run(HERE / "sglang_keys.py", tmp_path / "no kvfs", *models, variables=shims)
    found = msgspec.json.decode(done.stdout.splitlines()[-1], type=dict[str, str])
    one, copy, other = (found[str(model)] for model in models)
    assert len(bytes.fromhex(one)) == 32
    assert one == copy
    assert found["none"] == found["tagged"]
    assert len({one, other, found["none"], *(found[case] for case in DIFFERENT)}) == 3 + len(DIFFERENT)
    for case in ("lora", "adapters"):
        assert "adapter" in found[case]
