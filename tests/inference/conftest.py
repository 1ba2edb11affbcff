"""`kvfs up` for engines, which run in environments of their own; vLLM's, its model, and what it says without kvfs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_process import PROMPTS, engine, tokens

from commands import running_for_a_test
from environments import Environment, environment


@pytest.fixture
def directory() -> Iterator[Path]:
    """A data directory with a daemon; gone after each test whatever happened."""
    with running_for_a_test("512M") as data:
        yield data


@pytest.fixture(scope="session")
def vllm() -> Environment:
    return environment("vllm")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model") / "tiny"


@pytest.fixture(scope="session")
def alone(vllm: Environment, model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What an engine without kvfs says after each of PROMPTS."""
    with engine(vllm, model, tmp_path_factory.mktemp("alone") / "log", None) as one:
        return tokens(one.generate(PROMPTS))
