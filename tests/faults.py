"""Deaths on purpose: a stage of the cycle that raises at a certain turn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ralmspec.stages.generate import Generate
from ralmspec.stages.lookup import Lookup
from ralmspec.stages.prefetch import Prefetch
from ralmspec.stages.verify import Verify


class Bad(Exception):
    """Injected."""


class Deathbed:
    """The inbox of a stage that dies at a certain turn, with or without that turn in its hands."""

    def __init__(self, inbox: Any, moment: int, empty_handed: bool) -> None:
        self.inbox = inbox
        self.moment = moment
        self.empty_handed = empty_handed

    async def receive(self) -> Any:
        self._before()
        return self._after(await self.inbox.receive())

    def receive_nowait(self) -> Any:
        self._before()
        return self._after(self.inbox.receive_nowait())

    def _before(self) -> None:
        self.moment -= 1
        if self.moment <= 0 and self.empty_handed:
            raise Bad("deadly, before a turn")

    def _after(self, turn: Any) -> Any:
        if self.moment <= 0:
            raise Bad("deadly, with a turn")
        return turn


@contextmanager
def deadly(stage: type[Any], moment: int, empty_handed: bool) -> Iterator[None]:
    """One of the four stages dies at its so manieth turn."""
    original = stage.run

    async def run_to_death(self: Any, inbox: Any, outbox: Any) -> None:
        await original(self, Deathbed(inbox, moment, empty_handed), outbox)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "run", run_to_death)
        yield


STAGES = (Lookup, Generate, Verify, Prefetch)
