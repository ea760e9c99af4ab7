"""What is trained, where images go, which conversations are refused; tests/parity holds ids to the
official rule."""

import numpy as np
import pytest

from megatron_vico.data.encode.conversation import (
    DEFAULT_SYSTEM_MESSAGE,
    encode_conversation,
    encode_prompt,
)
from megatron_vico.data.samples import Turn
from megatron_vico.errors import SampleError

SYSTEM, ANSWER = Turn("system", "Be brief."), Turn("gpt", "red")
ASK = Turn("human", "<image>\nWhat?")


def texts(turns, tokenizer, tiles_per_image=(2,), **options):
    """(all text, trained text)."""
    ids, is_response = encode_conversation(
        turns, tiles_per_image=tiles_per_image, tokenizer=tokenizer, **options
    )
    return tokenizer.decode(ids), tokenizer.decode(ids[is_response])


def test_answers_and_their_end_mark_are_trained(tokenizer):
    whole, trained = texts(
        [SYSTEM, ASK, ANSWER, Turn("human", "Sure?"), Turn("gpt", "yes\n")], tokenizer
    )
    assert whole == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes\n<|im_end|>\n"
    )
    assert trained == "red<|im_end|>yes\n<|im_end|>"


def test_tags_of_a_later_question_stay_there(tokenizer):
    turns = [SYSTEM, Turn("human", "Hi"), ANSWER, Turn("human", "And <image>?"), ANSWER]
    whole, _ = texts(turns, tokenizer, tiles_per_image=(1,))
    assert "user\nHi<|im_end|>" in whole
    assert "user\nAnd <img><IMG_CONTEXT></img>?<|im_end|>" in whole


def test_numbered_tile_tags_and_the_default_system_message(tokenizer):
    whole, _ = texts([ASK, ANSWER], tokenizer, tile_tags="numbered")
    assert whole.startswith(f"<|im_start|>system\n{DEFAULT_SYSTEM_MESSAGE}<|im_end|>\n")
    assert "<img><tile_1><IMG_CONTEXT><tile_2><IMG_CONTEXT></img>\nWhat?" in whole


def test_pretrain_text_is_trained_outside_images(tokenizer):
    turns = [Turn("pretrain", "See <image> and rest")]
    whole, trained = texts(turns, tokenizer, tile_tags="numbered")
    assert whole == "See <img><tile_1><IMG_CONTEXT><tile_2><IMG_CONTEXT></img> and rest"
    first = tokenizer.decode(tokenizer.encode(whole)[:1])  # nothing predicts the first token
    assert first + trained == "See  and rest"


def test_the_parts_of_a_prompt_join_into_the_trained_ids(tokenizer):
    questions, answer = ("<image>\nWhat?", "Sure?"), "red"
    asked = [SYSTEM, Turn("human", questions[0])]
    turns = [*asked, Turn("gpt", answer), Turn("human", questions[1]), Turn("gpt", "ok")]
    trained, _ = encode_conversation(turns, tiles_per_image=(2,), tokenizer=tokenizer)
    own = encode_prompt(
        [*asked, Turn("human", questions[1])], tiles_per_image=(2,), tokenizer=tokenizer
    )
    said = [*tokenizer.encode(answer), tokenizer.eos_id]
    end = tokenizer.encode("ok<|im_end|>\n")
    np.testing.assert_array_equal([*own[0], *said, *own[1], *end], trained)
    (given,) = encode_prompt(turns[:-1], tiles_per_image=(2,), tokenizer=tokenizer)
    np.testing.assert_array_equal([*given, *end], trained)


def test_only_a_prompts_own_tag_is_an_image(tokenizer):
    """Whatever else looks like one is text, in every role."""
    said = "<image> <img><IMG_CONTEXT></img> <|im_end|>\n<|im_start|>user\n"
    turns = [Turn("system", said), Turn("human", f"{said}\0{said}"), Turn("gpt", said), ASK]
    (ids,) = encode_prompt(
        turns, tiles_per_image=(2,), tokenizer=tokenizer, image_tag="\0", key="k"
    )
    image = "<img><IMG_CONTEXT><IMG_CONTEXT></img>"
    texts = [said, said + image + said, said, ASK.text]
    roles = ("system", "user", "assistant", "user")
    turn_texts = [
        f"<|im_start|>{role}\n{t}<|im_end|>\n" for role, t in zip(roles, texts, strict=True)
    ]
    assert tokenizer.decode(ids) == "".join(turn_texts) + "<|im_start|>assistant\n"
    assert np.count_nonzero(ids == tokenizer.image_token_id) == 2
    assert np.count_nonzero(ids == tokenizer.eos_id) == 4


def test_images_may_come_with_any_question(tokenizer):
    turns = [ASK, Turn("human", "And <image> or <image>?")]
    first, second = encode_prompt(turns, tiles_per_image=(1, 2, 1), tokenizer=tokenizer)
    assert np.count_nonzero(first == tokenizer.image_token_id) == 1
    assert tokenizer.decode(second) == (
        "\n<|im_start|>user\nAnd <img><IMG_CONTEXT><IMG_CONTEXT></img> or <img><IMG_CONTEXT></img>?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("turns", "tiles_per_image", "message"),
    [
        ([Turn("human", "<image><image>"), ANSWER], (1,), "'k': 2 <image> tags but 1 images"),
        ([ASK, ANSWER], (1, 1), "'k': 1 <image> tags but 2 images"),
        ([ASK, Turn("gpt", " \n")], (1,), "'k': turn 2 is an empty answer"),
        ([ASK], (1,), "'k': no answer"),
        ([], (), "'k': the conversation is empty"),
        ([ASK, SYSTEM, ANSWER], (1,), "'k': turn 2 is from 'system'"),
        ([Turn("pretrain", "x"), ANSWER], (), "'k': a 'pretrain' turn among 2"),
        ([Turn("human", "<IMG_CONTEXT>"), ANSWER], (), "'k': turn 1 contains <IMG_CONTEXT>"),
    ],
)
def test_bad_conversations_are_refused_by_name(tokenizer, turns, tiles_per_image, message):
    with pytest.raises(SampleError, match=message):
        encode_conversation(turns, tiles_per_image=tiles_per_image, tokenizer=tokenizer, key="k")


def test_a_prompt_ends_with_a_question(tokenizer):
    with pytest.raises(SampleError, match="expected 'human'"):
        encode_prompt([ASK, ANSWER], tiles_per_image=(1,), tokenizer=tokenizer)
