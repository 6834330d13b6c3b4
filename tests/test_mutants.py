"""Every rule, broken on purpose, is noticed: the measure of the tests of R1 to R12."""

import gc
from collections import Counter
from collections.abc import Iterator

import pytest
from clocks import VirtualLoop
from mutants import MUTANTS as OF_THE_CYCLE
from mutants import Mutant
from mutants_of_admission import MUTANTS as OF_ADMISSION

MUTANTS = [*OF_THE_CYCLE, *OF_ADMISSION]
RULES = [f"R{number}" for number in range(1, 13)]


def test_every_rule_has_mutants() -> None:
    counts = Counter(mutant.rule for mutant in MUTANTS)
    assert set(RULES) <= set(counts)
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.fixture
def wreckage() -> Iterator[None]:
    """What a broken pipeline leaves behind is collected here, where its warnings mean nothing."""
    yield
    gc.collect()


# A loop that was torn down leaves coroutines and streams behind, which say so when they are collected.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("wreckage")
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_every_mutant_is_noticed(mutant: Mutant) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VirtualLoop, "turns", 300_000)
        mutant.breaks(patch)
        noticed: BaseException | None = None
        try:
            mutant.noticed_by()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            noticed = error
    assert noticed is not None, f"nobody noticed: {mutant}"
    for leaf in leaves(noticed):
        trace = leaf.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = trace.tb_frame.f_code.co_filename if trace is not None else ""
        assert not where.endswith("mutants.py"), f"the mutant itself is out of date: {leaf!r}"


def leaves(error: BaseException) -> Iterator[BaseException]:
    """What an exception group consists of."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaves(part)
    else:
        yield error
