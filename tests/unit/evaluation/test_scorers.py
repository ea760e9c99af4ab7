"""The metrics' edge cases, as the benchmark toolkits have them."""

import functools
import random

import pytest

from megatron_vico.evaluation.scorers import SCORERS, edit_distance, normalise_vqa


def naive_distance(left, right):
    @functools.cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        replaced = distance(i - 1, j - 1) + (left[i - 1] != right[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, replaced)

    return distance(len(left), len(right))


def test_edit_distance_equals_the_recursive_definition():
    rng = random.Random(0)
    for _ in range(200):
        left, right = ("".join(rng.choices("ab1", k=rng.randint(0, 7))) for _ in range(2))
        assert edit_distance(left, right) == naive_distance(left, right)


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "score"),
    [
        ("anls", "4712", ["4712"], 1.0),
        ("anls", "4711", ["4712"], 0.75),
        ("anls", "4799", ["4712"], 0.5),  # exactly one half is kept
        ("anls", "4999", ["4712"], 0.0),  # one quarter is not
        ("anls", "", ["4712"], 0.0),
        ("anls", "", [""], 1.0),
        ("anls", "The  Cat", ["the cat"], 1.0),
        ("anls", "a   bc", ["a bd"], 1 - 1 / 6),  # spaces collapse for the distance only
        ("anls", "dog", ["elephant", "dog"], 1.0),  # the nearest answer counts
        ("relaxed_accuracy", "105", ["100"], 1.0),  # exactly 5 % off
        ("relaxed_accuracy", "105.1", ["100"], 0.0),
        ("relaxed_accuracy", "95", ["100"], 1.0),
        ("relaxed_accuracy", "-105", ["-100"], 1.0),
        ("relaxed_accuracy", "12%", ["0.12"], 1.0),
        ("relaxed_accuracy", "12%", ["12"], 0.0),  # a per cent is a hundredth
        ("relaxed_accuracy", "12%", ["12.5%"], 1.0),
        ("relaxed_accuracy", "0", ["0"], 1.0),
        ("relaxed_accuracy", "0.0", ["0"], 0.0),  # gold 0: compared as text
        ("relaxed_accuracy", "0.001", ["0"], 0.0),
        ("relaxed_accuracy", "Yes", ["yes"], 1.0),
        ("relaxed_accuracy", "twelve", ["12"], 0.0),
        ("relaxed_accuracy", "nan", ["100"], 0.0),
        ("exact", "Cat ", ["cat"], 1.0),
        ("exact", "cat", ["dog", "CAT"], 1.0),
        ("exact", "cats", ["cat"], 0.0),
        ("exact", "", ["cat"], 0.0),
        ("ocrbench", "The sign says OPEN.", ["open"], 1.0),
        ("ocrbench", "two\nlines", ["two lines"], 1.0),
        ("ocrbench", "ope n", ["open"], 0.0),
        ("ocrbench", "shut", ["open", "closed"], 0.0),
        ("ocrbench_formula", "x ^ 2 + Y", ["x^2+ Y"], 1.0),  # spaces do not count
        ("ocrbench_formula", "X^2", ["x^2"], 0.0),  # letter case does
        # n of 10 agree: n times the one left out agrees and n - 1 are seen, 10 - n times all n.
        *(
            ("vqa_accuracy", "Stop!", ["stop"] * n + [f"other {i}" for i in range(10 - n)], score)
            for n, score in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0))
        ),
    ],
)
def test_edge_cases(metric, prediction, answers, score):
    assert SCORERS[metric](prediction, answers) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("a-b", "b"),  # a lone mark becomes a space, and then "a" is an article
        ("x-y", "x y"),
        ("none", "0"),
    ],
)
def test_vqa_normal_form(text, expected):
    assert normalise_vqa(text) == expected


def test_every_scorer_gives_one_for_the_answer_itself():
    for name, scorer in SCORERS.items():
        answers = ["4712"] * 10
        assert scorer("4712", answers) == 1.0, name
        assert scorer("cat", answers) == 0.0, name
