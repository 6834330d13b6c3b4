"""Models that think of every token by itself answer a proposal as one that reads it at once: in every place."""

from typing import Any

import numpy as np
import pytest
from fake_datastore import KeyedModel
from fakes import VOCABULARY, FakeModel

from ralmspec.pipeline.simulated import SimulatedModel
from ralmspec.stages.model import Prefix

TOKENS = np.random.default_rng(5).integers(1, VOCABULARY, 12)


@pytest.mark.parametrize("model", [FakeModel(), KeyedModel(), SimulatedModel()], ids=lambda model: type(model).__name__)
def test_a_proposal_is_answered_with_what_comes_after_the_tokens_before(model: Any) -> None:
    def alone(end: int) -> Any:
        (frontier,) = model.forward([Prefix(session=1, tokens=TOKENS[:end])])
        assert frontier.proposed is None
        return frontier

    for proposed in (1, 4, 11):
        (made,) = model.forward([Prefix(session=1, tokens=TOKENS, proposed=proposed)])
        np.testing.assert_array_equal(made.logits, alone(12).logits)
        expected = [alone(end).logits for end in range(12 - proposed, 12)]
        np.testing.assert_array_equal(made.proposed, expected, strict=True)
        assert len({row.argmax() for row in expected}) > 1 or proposed == 1, "the rows can be told apart"
