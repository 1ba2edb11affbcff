"""A vLLM engine process that takes orders (vllm_engine.py), and the prompts it is given."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from environments import Environment

HERE = Path(__file__).parent
BLOCK = 128  # tokens, vLLM's default on the CPU
PROMPT = 1000
WHOLE = PROMPT // BLOCK * BLOCK
TOKENS = 6


class Output(msgspec.Struct):
    tokens: list[int]
    cached: int


class Answer(msgspec.Struct):
    """What vllm_engine.py says."""

    ready: bool = False
    outputs: list[Output | None] = msgspec.field(default_factory=list[Output | None])
    seconds: float = 0


class Engine:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def answer(self) -> Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._log.read_text(errors="replace")[-6000:]
        return msgspec.json.decode(line, type=Answer)

    def order(self, prompts: Sequence[list[int]], *, together: bool = False, abort: Sequence[int] = ()) -> None:
        assert self._process.stdin is not None
        order = {"prompts": list(prompts), "tokens": TOKENS, "together": together, "abort": list(abort)}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def generate(
        self, prompts: Sequence[list[int]], *, together: bool = False, abort: Sequence[int] = ()
    ) -> list[Output]:
        """Of those that were not aborted."""
        self.order(prompts, together=together, abort=abort)
        return [output for output in self.answer().outputs if output is not None]

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")


@contextmanager
def engine(
    vllm: Environment,
    model: Path,
    log: Path,
    transfer: dict[str, object] | None,
    **options: object,
) -> Generator[Engine]:
    """One with this `kv_transfer_config`, or one that computes everything. It is ended in an orderly way."""
    if transfer is not None:
        options["kv_transfer_config"] = transfer
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [vllm.python, HERE / "vllm_engine.py", model, json.dumps(options)],
            env=vllm.variables({"PYTHONPATH": str(HERE)}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    try:
        made = Engine(process, log)
        assert made.answer().ready
        yield made
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0, made.log[-6000:]
    finally:
        process.kill()
        process.wait(30)


def prompt(seed: int, length: int = PROMPT) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(2, 1000) for _ in range(length)]


PROMPTS = [prompt(seed) for seed in range(6)]


def tokens(outputs: Sequence[Output]) -> list[list[int]]:
    return [output.tokens for output in outputs]


def cached(outputs: Sequence[Output]) -> list[int]:
    return [output.cached for output in outputs]
