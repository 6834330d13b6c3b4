"""What a session has written: steps are begun, written, taken back and committed, and the context follows."""

from ralmspec.stages.step import Step
from ralmspec.stages.transcript import Transcript

PROMPT = (9, 9, 9)


def begun(transcript: Transcript) -> Step:
    step = Step(index=transcript.begun, start=transcript.position, retrieved=None)
    transcript.begin(step)
    return step


def written(transcript: Transcript, *tokens: int) -> Step:
    step = begun(transcript)
    for token in tokens:
        transcript.write(step, token, ends=False)
    return step


def test_a_step_is_open_until_it_has_its_stride_of_tokens() -> None:
    transcript = Transcript(PROMPT, 2)
    assert transcript.open_step is None and transcript.position == 0
    step = begun(transcript)
    transcript.write(step, 1, ends=False)
    assert transcript.open_step is step and transcript.generated == [1]
    transcript.write(step, 2, ends=False)
    assert transcript.open_step is None and step.complete and not transcript.ended


def test_the_end_completes_a_short_step() -> None:
    transcript = Transcript(PROMPT, 4)
    step = begun(transcript)
    transcript.write(step, 1, ends=True)
    assert step.complete and transcript.ended and not transcript.finished
    step.certain = True
    assert transcript.commit() is step and transcript.finished and transcript.committed == [1]


def test_a_cut_takes_back_what_came_later_and_the_end_with_it() -> None:
    transcript = Transcript(PROMPT, 2)
    first, second = written(transcript, 1, 2), written(transcript, 3, 4)
    third = begun(transcript)
    transcript.write(third, 5, ends=True)
    assert transcript.cut(second, keep=1) == 2
    assert [*transcript.steps] == [first, second] and transcript.begun == 2
    assert transcript.context == [*PROMPT, 1, 2, 3] and second.tokens == [3]
    assert not second.complete and not transcript.ended
    assert transcript.before(second) == [*PROMPT, 1, 2] and transcript.before(first) == [*PROMPT]


def test_only_the_oldest_step_commits_and_only_when_nothing_about_it_is_open() -> None:
    transcript = Transcript(PROMPT, 2)
    first, second = written(transcript, 1, 2), written(transcript, 3, 4)
    second.certain = True
    assert transcript.commit() is None and transcript.unsettled is first
    first.certain = first.doubted = True
    assert transcript.commit() is None and transcript.doubted is first and transcript.unsettled is first
    first.doubted = False
    assert transcript.commit() is first
    assert transcript.commit() is second and transcript.commit() is None
    assert transcript.committed == [1, 2, 3, 4] and transcript.unsettled is None
