"""Paths of RaLMSeq through fakes, for tests of locality."""

from typing import Any

from fakes import FakeModel, FakeRetriever

from ralmspec.pipeline import InContext
from ralmspec.pipeline.engine import Engine, EngineOptions
from ralmspec.pipeline.locality import Walker

PROMPTS = ("3 1 4", "15 9 2 6", "5 3 5 8 9 7 9")
TOKENS = 37


def walker(seed: int = 0, retriever: Any = None, *, wide: int = 40, stubborn: float = 0.5) -> Walker:
    """Over fakes with which guesses fail often."""
    world = retriever or FakeRetriever(documents=300, dimension=8, seed=seed, spread=5)
    engine = Engine(EngineOptions(model=""), FakeModel(seed=seed, stubborn=stubborn), world, world, InContext())
    return Walker(engine, max_new_tokens=TOKENS, wide=wide)
