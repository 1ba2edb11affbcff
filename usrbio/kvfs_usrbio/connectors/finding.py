"""Finder: which blocks are there, asked without ever holding up the scheduler that asks.

A question waits at most PATIENCE for its answer; then the scheduler is told to ask again in a later step. After DEADLINE it
is answered as if nothing was there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvfs_usrbio.blocks import BlockStore
from kvfs_usrbio.connectors.link import Link
from kvfs_usrbio.queue import Operation, Queue

PATIENCE: Final = 0.002  # of one call, in seconds
DEADLINE: Final = 1.0  # of one question
MAX_QUESTIONS: Final = 1024  # unanswered; more are answered with nothing


@dataclass(slots=True)
class Lookups:
    """A connection for questions."""

    store: BlockStore
    queue: Queue


@dataclass(slots=True)
class _Question:
    connection: Lookups
    operation: Operation
    asked: float


class Finder:
    """Used by one thread."""

    def __init__(self, link: Link[Lookups]) -> None:
        self.link = link
        self._questions: dict[str, _Question] = {}

    def find(self, name: str, keys: Sequence[bytes]) -> list[int] | None:
        """For each key its value's bytes or -errno; [] if kvfs cannot say; None: ask again later, with the same `name` and
        keys."""
        question = self._questions.pop(name, None)
        if question is None:
            connection = self.link.current()
            if connection is None or not keys or len(self._questions) >= MAX_QUESTIONS:
                return []
            try:
                operation = connection.store.submit_exists(connection.queue, keys)
            except OSError as error:
                self.link.lose(connection, error)
                return []
            question = _Question(connection, operation, time.monotonic())
        try:
            return self._answer(name, question, len(keys))
        except OSError as error:
            self.link.lose(question.connection, error)
            return []

    def _answer(self, name: str, question: _Question, count: int) -> list[int] | None:
        until = time.monotonic() + PATIENCE
        queue, operation = question.connection.queue, question.operation
        while not operation.done:
            left = until - time.monotonic()
            if left <= 0:
                break
            try:
                queue.wait(left)
            except TimeoutError:
                break
        if operation.done:
            found = operation.result()
            self.link.worked()
            return found if len(found) == count else []
        if time.monotonic() - question.asked > DEADLINE:
            raise TimeoutError(f"no answer within {DEADLINE} s")
        self._questions[name] = question
        return None

    def forget(self, name: str) -> None:
        """The one who asked has gone."""
        self._questions.pop(name, None)
