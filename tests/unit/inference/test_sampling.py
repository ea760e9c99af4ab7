"""What is drawn, where an answer ends, and which text may be shown on the way."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece
from megatron_vico.inference.sampling import AnswerText, Chooser, Sampling

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("t") / "t"
    return load_tokenizer(train_sentencepiece(["ab abc stop"] * 9, model_prefix=prefix))


def drawn(number=4000, **settings):
    choose = Chooser(Sampling(**settings))
    found = torch.stack([choose(LOGITS, [2]) for _ in range(number)])
    return found.bincount(minlength=4) / number


def test_greedy_takes_the_most_likely():
    assert drawn(9, temperature=0.0, top_p=0.1).tolist() == [0, 1, 0, 0]
    assert Chooser(Sampling()).is_argmax


@pytest.mark.parametrize(
    ("settings", "kept", "temperature"),
    [
        ({}, [0, 1, 2, 3], 1.0),
        ({"temperature": 2.0}, [0, 1, 2, 3], 2.0),
        ({"top_k": 2}, [1, 3], 1.0),
        ({"top_p": 0.8}, [1, 3], 1.0),  # 0.64 + 0.24
        ({"top_p": 0.6}, [1], 1.0),
        ({"min_p": 0.3}, [1, 3], 1.0),  # exp(-1) of the best
    ],
)
def test_shares_are_those_of_the_rule(settings, kept, temperature):
    expected = torch.zeros(4)
    expected[kept] = (LOGITS[kept] / temperature).softmax(-1)
    # 4000 draws: a standard deviation is at most 0.008.
    torch.testing.assert_close(
        drawn(**({"temperature": 1.0} | settings)), expected, atol=0.03, rtol=0
    )


def test_a_repetition_is_made_less_likely():
    choose = Chooser(Sampling(repetition_penalty=4.0))
    assert not choose.is_argmax
    assert int(choose(LOGITS, [1, 1])) == 3


def test_a_seed_is_an_answer():
    def some(seed):
        choose = Chooser(Sampling(temperature=1.0, seed=seed))
        return [int(choose(LOGITS, [])) for _ in range(30)]

    assert some(1) == some(1) != some(2)


def shown(tokenizer, text, *stop, skip=True):
    """The final text, and the text after each token."""
    answer, steps = AnswerText(tokenizer, Sampling(stop=stop, skip_special_tokens=skip)), []
    for token in tokenizer.encode(text):
        answer.add(token)
        steps.append(answer.text)
        if answer.stopped:
            break
    answer.end()
    return answer.text, steps


@given(
    st.text("ab xs\u00e9\u65e5", max_size=20),
    st.lists(st.text("ab x\u00e9", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_and_only_grows(tokenizer, text, stop):
    final, steps = shown(tokenizer, text, *stop)
    starts = [text.find(each) for each in stop if each in text]
    # Which of two is first is decided when either is complete; the other may begin before it.
    assert final in ({text[:start] for start in starts} or {text})
    assert not any(each in final for each in stop)
    assert all(final.startswith(step) for step in steps)


def test_special_tokens_are_left_out_or_shown(tokenizer):
    assert shown(tokenizer, "a<img>b")[0] == "ab"
    assert shown(tokenizer, "a<img>b", skip=False)[0] == "a<img>b"
    assert shown(tokenizer, "a b c", "b c")[1][:2] == ["a", "a "]


def test_bytes_that_are_no_text_are_shown_in_the_end(tokenizer):
    answer = AnswerText(tokenizer, Sampling())
    broken = tokenizer.encode("\u65e5")[:2]
    for token in broken:
        answer.add(token)
    assert answer.text == ""
    answer.end()
    assert answer.text == tokenizer.decode(broken) != ""
    for token in tokenizer.encode("\u65e5" * 9)[1:]:  # no end is waited for
        answer.add(token)
    assert "\ufffd" in answer.text
