"""How one answer is scored: the benchmarks' metrics, each with its toolkit's edge cases.

Every scorer takes a prediction and the accepted answers and returns a score in [0, 1]. Where
toolkits differ, the rule is VLMEvalKit's, since the InternVL reports use it.
"""

import re
from collections.abc import Callable, Mapping, Sequence

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
VQA_AGREEING_ANNOTATORS = 3


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is an answer, apart from letter case and outer spaces; else 0."""
    return float(any(_plain(prediction) == _plain(answer) for answer in answers))


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity to the nearest answer, for DocVQA and InfoVQA.

    That is 1 - distance / length, or 0 where it is below 0.5 (exactly 0.5 is kept).
    """
    best = 0.0
    for answer in answers:
        # The toolkits collapse spaces for the distance, but not for the length it is divided by.
        length = max(len(prediction), len(answer))
        distance = edit_distance(
            " ".join(prediction.lower().split()), " ".join(answer.lower().split())
        )
        best = max(best, 1.0 - distance / length if length else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Within 5 % of a numeric answer, else equal as text, for ChartQA; "12%" reads as 0.12.

    An answer of 0 allows no relative tolerance and is compared as text: "0" matches "0", "0.0" does
    not.
    """
    return float(any(_relaxed_match(prediction, answer) for answer in answers))


def _relaxed_match(prediction: str, answer: str) -> bool:
    found, expected = _number(prediction), _number(answer)
    if found is not None and expected:
        return abs(found - expected) / abs(expected) <= RELAXED_TOLERANCE
    return _plain(prediction) == _plain(answer)


def ocrbench(prediction: str, answers: Sequence[str]) -> float:
    """1 if an answer occurs in the prediction, for OCRBench; a line break counts as a space."""
    text = _plain(prediction).replace("\n", " ")
    return float(any(_plain(answer).replace("\n", " ") in text for answer in answers))


def ocrbench_formula(prediction: str, answers: Sequence[str]) -> float:
    """OCRBench's rule for handwritten formulas: spaces do not count, letter case does."""
    text = prediction.strip().replace("\n", " ").replace(" ", "")
    return float(
        any(answer.strip().replace("\n", " ").replace(" ", "") in text for answer in answers)
    )


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with the annotators, for TextVQA: three who say the same make an answer right.

    One answer per annotator (ten in TextVQA), repeats included. The mean, over leaving out one
    annotator at a time, of min(1, agreeing others / 3).
    """
    found = normalise_vqa(prediction)
    agrees = [normalise_vqa(answer) == found for answer in answers]
    scores = [min(1.0, (sum(agrees) - own) / VQA_AGREEING_ANNOTATORS) for own in agrees]
    return sum(scores) / len(scores) if scores else 0.0


SCORERS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "anls": anls,
    "exact": exact,
    "ocrbench": ocrbench,
    "ocrbench_formula": ocrbench_formula,
    "relaxed_accuracy": relaxed_accuracy,
    "vqa_accuracy": vqa_accuracy,
}
"""Scorers by the name an evaluation set gives them."""


def edit_distance(left: str, right: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def normalise_vqa(text: str) -> str:
    """The VQA challenge's normal form: no punctuation, articles or number words."""
    text = text.lower().replace("\n", " ").replace("\t", " ").strip()
    inner_comma = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _PUNCTUATION:
        # The official script: a mark beside a space, or any mark in a text with "1,000" in it,
        # vanishes; else a space.
        vanishes = f"{mark} " in text or f" {mark}" in text or inner_comma
        out = out.replace(mark, "" if vanishes else " ")
    out = re.sub(r"\.(?!\d)", "", out)
    words = (_NUMBER_WORDS.get(word, word) for word in out.split())
    return " ".join(
        _CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the")
    )


def _plain(text: str) -> str:
    return text.strip().lower()


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_DIGITS.split())} | {"none": "0"}
_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's i'd've i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't
not've o'clock oughtn't shan't she'd've should've shouldn't somebody'll somebody's someone'd
someone'll someone's something'd something'll that'd that's there'd there're there's they'd they'll
they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
you'll you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
