"""What waits for what, in exact sums of virtual time.

Names, in seconds: e = encoding a query, p = one forward pass, b = one search. A step has k = 4 tokens, so it costs
a = e + k·p: its look-up and its decoding. n steps are served, `ignore_eos` makes them all full.
"""

import math
from itertools import takewhile
from typing import Any

import anyio
import pytest
from clocks import VirtualLoop
from fakes import AlwaysMisses, FakeModel, FakeRetriever, Workers

from ralmspec.pipeline import (
    Answer,
    Arrangement,
    Asynchronous,
    Continuous,
    InContext,
    Pipeline,
    Sequential,
    Synchronous,
)

K = 4


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


async def served(
    speculation: Arrangement,
    retriever: Any,
    *,
    n: int,
    e: float,
    p: float,
    b: float,
    model: Any = None,
    workers: Workers | None = None,
) -> tuple[float, Answer]:
    """Seconds that one session took, and its answer."""
    async with Pipeline(
        model=model or FakeModel(),
        retriever=retriever,
        workload=InContext(retrieval_stride=K),
        speculation=speculation,
        worker=workers or Workers(encoder=e, model=p, index=b),
    ) as pipeline:
        began = anyio.current_time()
        answer = await pipeline.complete("3 1 4", max_new_tokens=n * K, ignore_eos=True)
        seconds = anyio.current_time() - began
    assert answer.statistics.latency_s == pytest.approx(seconds)
    assert len(answer.tokens) == n * K and answer.statistics.steps == n
    return seconds, answer


def hits() -> FakeRetriever:
    """One document: after the first search every guess is right."""
    return FakeRetriever(documents=1)


@pytest.mark.parametrize("b", [0.0, 0.2, 3.0])
async def test_sequential(b: float) -> None:
    e, p, n = 0.05, 0.1, 7
    seconds, answer = await served(Sequential(), AlwaysMisses(), n=n, e=e, p=p, b=b)
    # Everything one after the other: n·(e + b + k·p).
    assert seconds == pytest.approx(n * (e + b + K * p))
    assert answer.statistics.kb_queries == n and not answer.statistics.wasted_tokens


async def test_sequential_with_a_short_last_step() -> None:
    async with Pipeline(
        model=FakeModel(),
        retriever=hits(),
        workload=InContext(retrieval_stride=K),
        speculation=Sequential(),
        worker=Workers(encoder=0.05, model=0.1, index=0.3),
    ) as pipeline:
        await pipeline.complete("3 1 4", max_new_tokens=9, ignore_eos=True)
    # Three steps, of 4, 4 and 1 tokens: 3·(e + b) + 9·p.
    assert anyio.current_time() == pytest.approx(3 * 0.35 + 9 * 0.1)


@pytest.mark.parametrize("s", [1, 2, 3, 5])
@pytest.mark.parametrize("b", [0.2, 3.0])
async def test_synchronous_all_hits(s: int, b: float) -> None:
    e, p, rounds = 0.05, 0.1, 3
    n = rounds * s
    seconds, answer = await served(Synchronous(speculation_stride=s), hits(), n=n, e=e, p=p, b=b)
    # Step 1: e + b. A round: s decodings, s look-ups (of steps 2 … s + 1), one search: s·k·p + s·e + b = s·a + b.
    # The last round has no step to look up after it, and its search is for s − 1 checks: with s = 1 there is none.
    expected = e + b + rounds * (s * (K * p + e) + b) - e - (b if s == 1 else 0)
    assert seconds == pytest.approx(expected)
    assert answer.statistics.kb_calls == rounds + (s > 1)
    assert not answer.statistics.rollbacks and not answer.statistics.wasted_tokens
    if s == 3 and b == 3.0:
        # 0.05 + 3 + 3·(3·0.45 + 3) − 0.05 = 16.05, where one after the other takes 9·3.45 = 31.05.
        assert seconds == pytest.approx(16.05)


@pytest.mark.parametrize("s", [1, 2, 3, 5])
@pytest.mark.parametrize("b", [0.2, 3.0])
async def test_synchronous_all_misses(s: int, b: float) -> None:
    e, p, n = 0.05, 0.1, 7
    seconds, answer = await served(Synchronous(speculation_stride=s), AlwaysMisses(), n=n, e=e, p=p, b=b)
    # Every round advances one step: the certain one, k·p. Beside it come drafts of the next s − 1 steps and look-ups
    # of the next s, as far as there are steps left, then a search, whose first verdict rolls all drafts back. The
    # redo is the next round's certain step. The last step needs no search.
    expected = e + b
    for left in range(n - 1, -1, -1):
        drafts, look_ups = min(s - 1, left), min(s, left)
        expected += K * p + drafts * K * p + look_ups * e + (b if left else 0)
    assert seconds == pytest.approx(expected)
    assert answer.statistics.rollbacks == n - 1
    assert answer.statistics.wasted_tokens == K * sum(min(s - 1, left) for left in range(n))
    if s == 1:  # no drafts, so a stride of 1 costs what RaLMSeq costs
        assert seconds == pytest.approx(n * (e + b + K * p))


@pytest.mark.parametrize("b", [0.1, 0.39, 0.45, 0.7, 3.0])
async def test_asynchronous_stride_1_all_hits(b: float) -> None:
    e, p, n = 0.05, 0.1, 8
    seconds, answer = await served(Asynchronous(speculation_stride=1), hits(), n=n, e=e, p=p, b=b)
    # Step 1 and the look-up of step 2: e + b + k·p + e. Then, from one search to the next, the step of the search
    # decodes and the next one is looked up beside it: max(a, b). The last search has only a decoding beside it.
    a = K * p + e
    assert seconds == pytest.approx(e + b + a + (n - 2) * max(a, b) + max(K * p, b))
    assert answer.statistics.kb_calls == n and not answer.statistics.wasted_tokens


@pytest.mark.parametrize("s", [2, 3, 5])
@pytest.mark.parametrize("b", [0.1, 0.45, 0.7, 3.0])
async def test_asynchronous_full_matches_cost_the_papers_formula(s: int, b: float) -> None:
    e, p, rounds = 0.05, 0.1, 4
    n = rounds * s + 1
    seconds, answer = await served(Asynchronous(speculation_stride=s), hits(), n=n, e=e, p=p, b=b)
    # First e + b, then s steps with their look-ups until the first search for s checks goes out. From one search to
    # the next: the step it ends with decodes, and the next one is looked up, beside it: max(a, b); then s − 1 more
    # steps: (s − 1)·a + max(a, b), the paper's formula. The last search has only a decoding beside it.
    a = K * p + e
    assert seconds == pytest.approx(e + b + s * a + (rounds - 1) * ((s - 1) * a + max(a, b)) + max(K * p, b))
    assert answer.statistics.kb_calls == rounds + 1 and not answer.statistics.wasted_tokens


@pytest.mark.parametrize("b", [0.1, 0.45, 0.7, 3.0])
async def test_continuous_never_waits_for_a_verdict(b: float) -> None:
    e, p, n = 0.05, 0.1, 12
    seconds, answer = await served(Continuous(), hits(), n=n, e=e, p=p, b=b)
    # After the first search all steps follow one another. Their checks go out from the second look-up on, each batch
    # when the one before it has come home, or if nothing waits then, at the next look-up; the last brings what is left.
    a = K * p + e
    looked = [e + b + step * a for step in range(1, n)]
    home, searches = looked[0], 1
    while looked:
        begins = max(home, looked[0])
        home, searches = begins + b, searches + 1
        looked = [at for at in looked if at > begins + 1e-9]
    assert seconds == pytest.approx(max(e + b + n * a - e, home))
    assert answer.statistics.kb_calls == searches and not answer.statistics.wasted_tokens


async def test_two_flights_set_out_by_turns() -> None:
    e, p, b, n = 0.05, 0.1, 3.0, 24
    retriever = hits()
    retriever.concurrency = 2
    seconds, _ = await served(Continuous(flights=2), retriever, n=n, e=e, p=p, b=b)
    # a = 0.45. Nothing is known of a and b at first, so the checks of steps 2 and 3 set out as soon as they are there.
    # The first of them comes home 3.0 later; 5 more steps have been looked up by then, and a flight is worth
    # 3.0 / 0.45 / 2 checks, that is 4. From now on a flight is free whenever 4 steps have been looked up.
    assert retriever.searches == [1, 1, 1, 5, 4, 4, 4, 4]
    # The last look-up fills the last flight.
    assert seconds == pytest.approx(e + b + (n - 1) * (K * p + e) + b)


class Noted(FakeModel):
    """Notes when each pass ended, and the first token of its document."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[float, int]] = []

    def forward(self, prefixes: Any) -> Any:
        self.log.append((anyio.current_time(), int(prefixes[0].tokens[0])))
        return super().forward(prefixes)


@pytest.mark.parametrize("b", [0.05, 0.25, 0.301, 0.399, 0.43, 0.6])
async def test_a_rollback_interrupts_at_the_next_token(b: float) -> None:
    e, p, n = 0.05, 0.1, 6
    model, retriever, workers = Noted(), AlwaysMisses(), Workers(encoder=e, model=p, index=b)
    seconds, answer = await served(
        Asynchronous(speculation_stride=1, prefetch=1), retriever, n=n, e=e, p=p, b=b, model=model, workers=workers
    )
    # The search for step i + 1 goes out when that step has been looked up; its draft decodes beside it. The verdict
    # comes b later, in the middle of a pass, or of the look-up after the draft's last token. That one call is waited
    # for, nothing else: the redo begins at the next multiple of p, or, if the draft was complete, after its look-up,
    # which the last step has not.
    waits = [math.ceil(b / p) * p if b <= K * p else max(b, K * p + e)] * (n - 1)
    if b > K * p:
        waits[-1] = b
    assert seconds == pytest.approx(e + b + n * K * p + (n - 1) * e + sum(waits))
    assert answer.statistics.rollbacks == n - 1
    assert answer.statistics.wasted_tokens == (n - 1) * min(math.ceil(b / p), K)

    # The same, seen from the model: after a verdict the pass that was running ends, and the next one is the redo.
    truth = [step.document.id for step in answer.steps]
    verdicts = [end for _, end in workers["index"].log]
    assert len(verdicts) == n and truth == list(range(n))
    for step in range(1, n):
        after = [(at, document) for at, document in model.log if at > verdicts[step] + 1e-9]
        running = list(takewhile(lambda entry: entry[1] == 0, after))
        assert len(running) <= 1 and all(at < verdicts[step] + p for at, _ in running)
        redone = after[len(running) :][:K]
        assert [document for _, document in redone] == [truth[step]] * K
        assert redone[0][0] == pytest.approx(verdicts[step] - b + waits[step - 1] + p)


async def test_verification_beside_decoding_beats_waiting_at_equal_strides() -> None:
    for b in (0.45, 0.9, 2.7):
        waiting, _ = await served(Synchronous(speculation_stride=3), hits(), n=13, e=0.05, p=0.1, b=b)
        beside, _ = await served(Asynchronous(speculation_stride=3), hits(), n=13, e=0.05, p=0.1, b=b)
        sequential, _ = await served(Sequential(), hits(), n=13, e=0.05, p=0.1, b=b)
        assert beside < waiting < sequential


async def test_sessions_share_the_stages() -> None:
    """Two sessions: while one is being searched for, the other one decodes."""
    e, p, b, n = 0.0, 0.1, 0.4, 5
    async with (
        Pipeline(
            model=FakeModel(),
            retriever=hits(),
            workload=InContext(retrieval_stride=K),
            speculation=Sequential(),
            worker=Workers(encoder=e, model=p, index=b),
        ) as pipeline,
        anyio.create_task_group() as callers,
    ):

        async def later() -> None:
            await anyio.sleep(b)
            await pipeline.complete("2 7", max_new_tokens=n * K, ignore_eos=True)

        callers.start_soon(later)
        await pipeline.complete("3 1 4", max_new_tokens=n * K, ignore_eos=True)
    # Alone each takes n·(b + k·p) = 4.0; in step with each other the second one ends b after the first.
    assert anyio.current_time() == pytest.approx(n * (b + K * p) + b)
