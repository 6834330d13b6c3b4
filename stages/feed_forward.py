"""Reads what enters a network's last feed-forward layer: the state of the left context, one vector a token."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class FeedForwardInput:
    """A hook on the last block's feed-forward layer, which keeps its input while somebody asks for it.

    That input is as the network has it: behind the norm before the layer, where there is one. `dimension` is its width.
    The hook is set once. Who asks is remembered by the running thread's context, so passes that run at the same time
    in several threads never see each other's states, and a pass for which nobody asks keeps none.
    """

    def __init__(self, network: Any) -> None:
        self.dimension = int(network.config.hidden_size)
        self._asked: ContextVar[Callable[[Any], None] | None] = ContextVar("ralmspec_feed_forward", default=None)
        _last_feed_forward(network).register_forward_pre_hook(self._seen)

    @contextmanager
    def kept(self) -> Iterator[list[Any]]:
        """Inside, each pass of this thread adds its states to the list: a tensor whose last axis is `dimension`."""
        seen: list[Any] = []
        with self._asking(seen.append):
            yield seen

    def alone(self, run: Callable[[], object]) -> Any:
        """The states of the pass that `run` begins; it ends with them, and what comes after is never computed."""

        def stop(states: Any) -> None:
            raise _Enough(states)

        with self._asking(stop):
            try:
                run()
            except _Enough as enough:
                return enough.states
        raise RuntimeError("the pass did not reach the last feed-forward layer")

    @contextmanager
    def _asking(self, take: Callable[[Any], None]) -> Iterator[None]:
        before = self._asked.set(take)
        try:
            yield
        finally:
            self._asked.reset(before)

    def _seen(self, layer: Any, inputs: tuple[Any, ...]) -> None:
        if (take := self._asked.get()) is not None:
            take(inputs[0])


class _Enough(Exception):
    """Ends a pass of which the rest is not wanted; it never leaves this file."""

    def __init__(self, states: Any) -> None:
        super().__init__("the pass was ended on purpose")
        self.states = states


def _last_feed_forward(network: Any) -> Any:
    """Of a network of one of `checkpoint.FAMILIES`."""
    match network.config.model_type:
        case "gpt2":
            return network.transformer.h[-1].mlp
        case "opt":
            return network.model.decoder.layers[-1].fc1
        case _:  # LLaMA and those of its shape
            return network.model.layers[-1].mlp
