"""What kvfs's connectors for vLLM know of a model, and that all processes of an engine know the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from environments import environment

HERE = Path(__file__).parent


@pytest.mark.timeout(900)
def test_keys_are_those_of_the_model_and_of_how_it_was_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = environment("vllm").run(HERE / "vllm_keys.py", tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    known = [found[case] for case in ("plain", "dummy", "object store", "local", "hub with version")]
    assert {len(one) for one in known} == {64}
    assert len(set(known)) == len(known)
    assert "LoRA" in found["adapters"]
    assert '"version"' in found["hub"]
    first, *others = found["stages"]
    assert first[0] == [2, 3, 2]
    assert others == [first, first]
    assert found["other stages"][1] != first[1]
