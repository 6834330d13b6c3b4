"""English text to index terms, as close to Lucene's EnglishAnalyzer as libraries outside Java come."""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import chain, pairwise

from .base import Document
from .errors import BadKnowledge, MissingExtra

NAME = "english-1"
"""Names these rules in an index; an index made by other rules must not be served with these."""

_STOP_WORDS = frozenset(
    ("a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if")
    + ("in", "into", "is", "it", "no", "not", "of", "on", "or", "such", "that")
    + ("the", "their", "then", "there", "these", "they", "this", "to", "was", "will", "with")
)
_APOSTROPHES = "'\u2019\uff07"
# Java lowers one code point at a time; Python knows two cases where the neighbours or the language matter.
_ONE_BY_ONE = str.maketrans({"\u0130": "i", "\u03a3": "\u03c3"})

_CHUNK = re.compile(r"[^ \t\r\n]+")  # no token crosses a blank, so what lies between blanks is analysed on its own
_CACHED_CHUNKS, _CACHED_LENGTH = 1 << 16, 64
_READING = 6  # times the work of going through the numbers of a passage once more
_TELL_EVERY = 10_000  # of such work

_A_VOWEL_THEN_A_CONSONANT = re.compile(r"(?:[aeiou]|(?<=[^aeiou])y)[^aeiou]")  # Porter's measure is above 0


class Analyzer:
    """Terms of an English text, in order, repeats kept: tokens, possessives, lower case, stop words, Porter stems.

    - **Tokens** follow Unicode's word boundaries (UAX #29), as in Lucene's StandardTokenizer: letters and digits in a
      run, joined by `'`, `.` or `:` between letters and by `'`, `.`, `,` or `;` between digits, `_` counting as a
      letter; single letters and digits stand; so do single ideographs, single hiragana, runs of katakana, of Thai and
      its neighbours, and emoji. Everything else separates.
    - **`'s`** at the end of a token goes, and then Lucene's 33 stop words.
    - **Stems** are Porter's of 1980, by Snowball. Lucene's code has three departures that its author added later:
      words under three letters stay, `-logi` becomes `-log`, and `-bli` (not only `-abli`) becomes `-ble`. They are
      added here.

    Of 100,004 passages of Wikipedia, 14 have tokens other than those of Lucene 9.9 (rare symbols, Hebrew quotation
    marks), and 4 of their 217,335 words have another stem (a doubled k or v before -ed and -ing).

    Thread-safe. Raises `MissingExtra` if a package is absent.
    """

    def __init__(self) -> None:
        try:
            import regex  # type: ignore[import-untyped]
            import Stemmer  # type: ignore[import-not-found]
        except ImportError:
            raise MissingExtra("the analyser of BM25 needs: pip install 'ralmspec[local]'") from None
        self._find_tokens = regex.compile(_token_pattern()).findall
        self._new_stemmer = partial(Stemmer.Stemmer, "porter", 0)  # 0: its own cache of words is slow once full
        # A text is mostly words seen before: remembering chunks makes analysing several times as fast.
        self._remembered = lru_cache(_CACHED_CHUNKS)(self._terms_of_chunk)

    def __call__(self, text: str) -> list[str]:
        """The terms of a text; none if it holds nothing but stop words and punctuation."""
        return list(chain.from_iterable(map(self._terms_of_any_chunk, _CHUNK.findall(text))))

    def _terms_of_any_chunk(self, chunk: str) -> tuple[str, ...]:
        return self._remembered(chunk) if len(chunk) <= _CACHED_LENGTH else self._terms_of_chunk(chunk)

    def _terms_of_chunk(self, chunk: str) -> tuple[str, ...]:
        words = map(_plain_word, self._find_tokens(chunk))
        return tuple(self._stem(word) for word in words if word not in _STOP_WORDS)

    def _stem(self, word: str) -> str:
        if len(word) < 3:
            return word
        stemmer = self._new_stemmer()  # one a call: a stemmer has one buffer, and threads share this analyser
        stem: str = stemmer.stemWord(word)
        if word.endswith("ie"):  # its e went in the last step, so the i was never the end of an earlier one
            return stem
        if stem.endswith("logi") and _A_VOWEL_THEN_A_CONSONANT.search(stem[:-4]):
            return stem[:-1]
        if stem.endswith("bli") and _A_VOWEL_THEN_A_CONSONANT.search(stem[:-3]):
            stem = stemmer.stemWord(stem[:-1] + "e")
        return stem


class TermNumbers:
    """Passages as the numbers of their terms, numbered as they appear: 4 bytes a term, and the texts are let go.

    A passage is read as its title, a line break and its text; its id must be its row, else `BadKnowledge`. This is
    what bm25s indexes: `ids`, a list of numbers a passage, to be iterated over again and again, and `vocab`, the
    numbers by term. `tell` hears of this reading and of `iterations` to come as of one piece of work, in passages.
    """

    def __init__(
        self, passages: Iterable[Document], tell: Callable[[int, int], None], total: int, *, iterations: int
    ) -> None:
        self.ids = self
        self.vocab: dict[str, int] = {}
        self._numbers, self._ends = array("i"), array("q", [0])
        self._tell, self._total, self._share = tell, total, _READING + iterations
        self._work = 0
        analyze, vocab = Analyzer(), self.vocab
        for row, passage in enumerate(passages):
            if passage.id != row:
                raise BadKnowledge(f"passage {row} has the id {passage.id}; ids must count up from 0")
            terms = analyze(f"{passage.title}\n{passage.text}")
            self._numbers.extend([vocab.setdefault(term, len(vocab)) for term in terms])
            self._ends.append(len(self._numbers))
            self._did(_READING)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for start, end in pairwise(self._ends):
            self._did(1)
            yield self._numbers[start:end].tolist()

    def _did(self, work: int) -> None:
        before, self._work = self._work, self._work + work
        if before // _TELL_EVERY < self._work // _TELL_EVERY:
            self._tell(min(self._work // self._share, self._total), self._total)


def _plain_word(token: str) -> str:
    if len(token) > 2 and token[-1] in "sS" and token[-2] in _APOSTROPHES:
        token = token[:-2]
    return token.lower() if token.isascii() else token.translate(_ONE_BY_ONE).lower()


def _token_pattern() -> str:
    """UAX #29 as one pattern for the regex package; WB is its name for Unicode's property of word breaking."""
    marks = r"\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}"  # belong to what stands before them

    def run(characters: str) -> str:
        return f"[{characters}][{characters}{marks}]*+"

    def one(characters: str) -> str:
        return f"[{characters}][{marks}]*+"

    letters = run(r"a-zA-Z\p{WB=ALetter}\p{WB=Hebrew_Letter}")
    digits = run(r"0-9\p{WB=Numeric}")
    katakana = run(r"\p{WB=Katakana}")
    low_lines = run(r"_\p{WB=ExtendNumLet}")
    either = r"\p{WB=MidNumLet}\p{WB=Single_Quote}"
    between_letters, between_digits = one(rf":\p{{WB=MidLetter}}{either}"), one(rf"\p{{WB=MidNum}}{either}")
    part = (
        f"(?:(?:{letters}(?:(?:{low_lines}|{between_letters}){letters})*+"
        f"|{digits}(?:(?:{low_lines}|{between_digits}){digits})*+)++"
        f"|{katakana}(?:{low_lines}{katakana})*+)"
    )
    picture = one(r"\p{Extended_Pictographic}")
    return "|".join(
        [
            f"(?:{low_lines})?{part}(?:{low_lines}{part})*+(?:{low_lines})?",
            one(r"\p{Script=Han}"),
            one(r"\p{Script=Hiragana}"),
            r"\p{LB=SA}++",  # Thai, Lao, Khmer, Myanmar: without dictionaries, a run is a token
            rf"{picture}(?:(?<=\u200d){picture})*+",
            one(r"\p{Regional_Indicator}") * 2,
        ]
    )
