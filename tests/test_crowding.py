"""More sessions than a forward pass takes: who comes first, and when speculation makes way."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from clocks import VirtualLoop
from fakes import AlwaysMisses, FakeModel, FakeRetriever, fixed

from ralmspec.pipeline import (
    Arrangement,
    Asynchronous,
    Continuous,
    InContext,
    Limits,
    Pipeline,
    Sequential,
    Statistics,
    Synchronous,
)
from ralmspec.stages.generate import Generate
from ralmspec.stages.load import Load
from ralmspec.stages.messages import Place, Turn


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


class Passes(Generate):
    """Notes who is in each pass instead of making it; sessions are names, those in capitals draft."""

    def __init__(self, names: str, batch: int, meanwhile: Sequence[str] = ()) -> None:
        self.table: Any = {ord(n): SimpleNamespace(drafts=n.isupper(), come_home=lambda turn: None) for n in names}
        self.made: list[str] = []
        self.load = Load()
        self.crowded: list[bool] = []
        self.home: list[str] = []
        self.inlet, self.inbox = anyio.create_memory_object_stream[Turn](100)
        self.meanwhile = iter(meanwhile)
        model: Any = SimpleNamespace(max_batch=batch)
        super().__init__(self.table, model, None, None, lambda: 0.0, load=self.load)  # type: ignore[arg-type]

    def arrive(self, names: str) -> None:
        for name in names:
            self.inlet.send_nowait(Turn(session=ord(name), epoch=0, place=Place.GENERATE, issued=0.0))

    async def _serve(self, turns: Any, outbox: Any) -> None:
        self.made.append("".join(chr(turn.session) for turn in turns))
        self.crowded.append(self.load.crowded)
        self.arrive(next(self.meanwhile, ""))

    def send_nowait(self, session: Any, /) -> None:
        self.home.append(next(chr(id) for id, other in self.table.items() if other is session))

    async def send(self, session: Any, /) -> None:
        self.send_nowait(session)

    async def play(self, names: str) -> list[str]:
        self.arrive(names)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.run, self.inbox, self)
            await anyio.wait_all_tasks_blocked()
            self.inlet.close()
        self.inbox.close()
        return self.made


async def test_all_who_are_there_share_a_pass() -> None:
    assert await Passes("abCD", batch=4, meanwhile=["bC", "a"]).play("abCD") == ["abCD", "bC", "a"]


async def test_certain_steps_go_first_and_drafts_get_what_is_left() -> None:
    passes = Passes("abcDEF", batch=4)
    assert await passes.play("DaEbFc") == ["abcD", "EF"]
    assert passes.crowded == [False, False] and not passes.home


async def test_who_does_not_fit_waits_in_the_order_of_coming() -> None:
    passes = Passes("abcdefgh", batch=3, meanwhile=["h", "a"])
    assert await passes.play("abcdefg") == ["abc", "def", "gha"]


async def test_where_certain_steps_fill_a_pass_drafts_go_home_without_one() -> None:
    passes = Passes("abcdeFG", batch=2, meanwhile=["", "", "F"])
    assert await passes.play("aFbcGde") == ["ab", "cd", "e", "F"]
    assert passes.crowded == [True, True, False, False]
    assert passes.home[:2] == ["F", "G"]


async def test_exactly_full_is_not_crowded_unless_somebody_waits() -> None:
    passes = Passes("abC", batch=2, meanwhile=["abC"])
    assert await passes.play("ab") == ["ab", "ab"]
    assert passes.crowded == [False, True] and passes.home[:1] == ["C"]


async def test_who_made_way_is_looked_at_again_before_the_model_idles() -> None:
    passes = Passes("abC", batch=2)
    assert await passes.play("abC") == ["ab"]
    assert passes.home == ["C", "a", "b", "C"] and passes.crowded == [True] and not passes.load.crowded


async def test_who_made_way_is_looked_at_again_though_the_crowd_had_gone_before() -> None:
    passes = Passes("abcdeFG", batch=2)
    assert await passes.play("aFbcGde") == ["ab", "cd", "e"]
    assert passes.crowded == [True, True, False]
    assert passes.home == [*"FG", *"abcdeFG"], "once, and before the model idles"


async def test_drafts_alone_never_crowd() -> None:
    passes = Passes("ABCDE", batch=2)
    assert await passes.play("ABCDE") == ["AB", "CD", "E"]
    assert passes.crowded == [False] * 3 and not passes.home


# With a whole pipeline, in virtual time -------------------------------------------------------------------------------

SPECULATIONS: dict[str, Arrangement] = {
    "synchronous": Synchronous(speculation_stride=4),
    "asynchronous": Asynchronous(speculation_stride=4),
    "continuous": Continuous(window=8, flights=2),
}


async def seconds(speculation: Arrangement, sessions: int, retriever: Any, batch: int) -> tuple[float, Statistics]:
    """Until all of so many sessions that come at once are served, and what that took; one pass takes 10 ms."""
    model = FakeModel(ends=False)
    model.max_batch = batch
    total = Statistics()
    async with Pipeline(
        model=model,
        retriever=retriever,
        workload=InContext(retrieval_stride=4),
        speculation=speculation,
        limits=Limits(sessions=sessions),
        worker=fixed(model=0.01, encoder=0.001, index=0.02),
    ) as pipeline:
        began = anyio.current_time()

        async def one(n: int) -> None:
            answer = await pipeline.complete(f"{n} 3 {n % 5}", max_new_tokens=32, ignore_eos=True)
            total.wasted_tokens += answer.statistics.wasted_tokens
            total.new_tokens += answer.statistics.new_tokens

        async with anyio.create_task_group() as callers:
            for n in range(sessions):
                callers.start_soon(one, n)
        return anyio.current_time() - began, total


@pytest.mark.parametrize("speculation", SPECULATIONS.values(), ids=SPECULATIONS.keys())
@pytest.mark.parametrize("sessions", [8, 64])
async def test_where_no_guess_is_right_a_crowd_loses_next_to_nothing(speculation: Arrangement, sessions: int) -> None:
    """Speculation makes way before it costs throughput, however bad its guesses are."""
    sequential, _ = await seconds(Sequential(), sessions, AlwaysMisses(), batch=2)
    speculative, total = await seconds(speculation, sessions, AlwaysMisses(), batch=2)
    assert speculative <= 1.05 * sequential
    assert total.wasted_tokens <= 0.15 * total.new_tokens


@pytest.mark.parametrize("speculation", SPECULATIONS.values(), ids=SPECULATIONS.keys())
async def test_idle_time_is_used_all_the_same(speculation: Arrangement) -> None:
    sequential, _ = await seconds(Sequential(), 2, FakeRetriever(documents=1), batch=2)
    speculative, _ = await seconds(speculation, 2, FakeRetriever(documents=1), batch=2)
    assert speculative < 0.85 * sequential
