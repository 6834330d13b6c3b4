"""The pipeline that a program embeds: open it once, serve sessions from it."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Self

import anyio
from anyio import AsyncContextManagerMixin

from ralmspec.retrievers.base import Drafter, Retriever
from ralmspec.stages.in_context import InContext
from ralmspec.stages.messages import Committed, Done, Event
from ralmspec.stages.model import LanguageModel
from ralmspec.stages.request import Request
from ralmspec.stages.sampling import Sampling
from ralmspec.stages.stage import Stage, Worker
from ralmspec.stages.workload import Workload

from .adaptive import Adaptive
from .errors import NotServing
from .limits import Limits
from .runner import Runner
from .speculation import Always, Chooser, Speculation
from .stream import Answer, SessionStream
from .threads import ThreadWorker


class Pipeline(AsyncContextManagerMixin):
    """Serves iterative retrieval-augmented generation, with speculation.

        async with Pipeline(model=model, retriever=retriever) as pipeline:
            answer = await pipeline.complete("who plays ken barlow in coronation street?")

    Runs on asyncio and trio, inside whatever program is there already. `speculation` is one of the arrangements
    (`Sequential`, `Synchronous`, `Asynchronous`, `Continuous`), or `Adaptive`, which chooses among them; all give
    the same tokens. `drafter` is a faster index over the same documents, which guesses beside the session's cache:
    HNSW where `retriever` is exact. A search of it is part of every look-up, and one that fails ends its session.
    `output` are stages that every event passes on its way to the caller. Leaving the block drains: sessions that
    are live may end within `limits.drain_s`, then the rest is ended with `NotServing`. If a stage died, leaving
    raises `EngineDead`.
    """

    def __init__(
        self,
        *,
        model: LanguageModel,
        retriever: Retriever,
        workload: Workload | None = None,
        speculation: Speculation | None = None,
        drafter: Drafter | None = None,
        output: Sequence[Stage[Event, Event]] = (),
        limits: Limits | None = None,
        worker: Callable[[str, int], Worker] | None = None,
    ) -> None:
        self.model = model
        self.retriever = retriever
        self.limits = limits or Limits()
        self.speculation = speculation or Adaptive()
        self._chooser = self.speculation if isinstance(self.speculation, Chooser) else Always(self.speculation)
        if drafter is not None and len(drafter) != len(retriever):
            raise ValueError(
                f"the drafter searches {len(drafter):,} documents, the retriever {len(retriever):,}: "
                "they must be the same ones"
            )
        self._drafter = drafter
        self._workload = (workload or InContext()).bind(model, retriever)
        self._output = tuple(output)
        self._worker = worker or ThreadWorker
        self._runner: Runner | None = None

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        """Start the stages; drain them on leaving."""
        self._runner = Runner(
            model=self.model,
            retriever=self.retriever,
            drafter=self._drafter,
            workload=self._workload,
            chooser=self._chooser,
            output=self._output,
            limits=self.limits,
            worker=self._worker,
        )
        async with self._runner.serve():
            yield self

    @property
    def ready(self) -> bool:
        """Whether new sessions are served: false before entering, while draining, and after a stage died."""
        return self._runner is not None and self._runner.accepting

    @property
    def live_sessions(self) -> int:
        """Slots in use, those of ended sessions with work still on its way home included."""
        return len(self._runner.switch.live) if self._runner else 0

    @property
    def waiting_sessions(self) -> int:
        """Requests that wait for a slot or for KV memory."""
        return self._runner.admission.waiting if self._runner else 0

    def session(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        ignore_eos: bool = False,
        drafts: bool = False,
        trace: bool = False,
        deadline_s: float = float("inf"),
    ) -> SessionStream:
        """A session for this prompt; its slot is taken on entering it, which may mean to wait for one.

        `drafts=True` also yields drafted tokens and the rollbacks that retract them. `ignore_eos` goes on to
        `max_new_tokens` whatever the model says. `deadline_s` counts from entering. Entering raises `EmptyPrompt`,
        `PromptTooLong`, `Overloaded`, `DeadlineExceeded`, `NotServing`, `EngineDead`; `ValueError` here for numbers
        that make no sense.
        """
        runner = self._runner
        if runner is None:
            raise NotServing("the pipeline is not open: enter it with `async with`, and open sessions inside")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        longest = self._workload.room() + max_new_tokens
        if longest > (most := min(self.model.context_length, self.model.kv_tokens)):
            raise ValueError(
                f"a prefix could grow to {longest} tokens, the model has room for {most}: "
                "lower max_new_tokens, or the workload's max_prompt_tokens or max_document_tokens"
            )
        if not deadline_s > 0:
            raise ValueError(f"deadline_s={deadline_s}: must be above 0")

        def request() -> Request:
            deadline = anyio.current_time() + deadline_s
            runner.admission.refuse_if_hopeless(max_new_tokens, deadline)  # before the prompt is tokenised
            tokens, cut = self._workload.prompt(prompt)
            return Request(
                prompt=tuple(tokens),
                prompt_tokens_cut=cut,
                max_new_tokens=max_new_tokens,
                sampling=sampling or Sampling(),
                end_tokens=frozenset() if ignore_eos else self.model.end_tokens,
                drafts=drafts,
                trace=trace,
                deadline=deadline,
                unread_limit=self.limits.unread_events,
            )

        return SessionStream(runner, request)

    async def complete(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        ignore_eos: bool = False,
        trace: bool = False,
        deadline_s: float = float("inf"),
    ) -> Answer:
        """Serve one session to its end. Raises what `session` raises, and what ended the session before its end."""
        steps: list[Committed] = []
        async with self.session(
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            ignore_eos=ignore_eos,
            trace=trace,
            deadline_s=deadline_s,
        ) as session:
            async for event in session:
                if isinstance(event, Committed):
                    steps.append(event)
                elif isinstance(event, Done):
                    return Answer(
                        text="".join(step.text for step in steps),
                        tokens=tuple(token for step in steps for token in step.tokens),
                        steps=tuple(steps),
                        statistics=event.statistics,
                        timeline=session.timeline,
                    )
        raise AssertionError("a stream ends with Done or an error")
