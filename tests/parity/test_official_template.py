"""Token ids and labels equal the official `internvl2_5` template, restated here literally and run
by transformers."""

import base64
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from megatron_vico.data.encode.conversation import encode_conversation
from megatron_vico.data.encode.expand import expand
from megatron_vico.data.encode.tokenizer import load_tokenizer
from megatron_vico.data.encode.video import with_frames
from megatron_vico.data.samples import EncodedSample, Turn

IGNORED = -100
tool = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "tools" / "build_tokenizer.py"))
)
SYSTEM_MESSAGE = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: E501, RUF001

ASK, ANSWER = Turn("human", "<image>\nWhat is  this?"), Turn("gpt", " A red\n\nhouse, no. 42.")
SYSTEM, THOUGHT = (
    Turn("system", "Be brief."),
    Turn("gpt", "<think>\nIt is\n\n red.\n</think>\n\nred"),
)
THINK = Turn(
    "system",
    "Enclose this entire thinking process within <think> and </think> tags.\n\n2. Then answer.\n",
)
CONVERSATIONS = {
    "text only": ([Turn("human", "Hello"), Turn("gpt", "Hi!")], ()),
    "answer with leading newline": ([Turn("human", "Hello\n"), Turn("gpt", "\n\nHi!\n")], ()),
    "own system message": ([Turn("system", "Be brief."), Turn("human", "Hello"), ANSWER], ()),
    "one image, one tile": ([ASK, ANSWER], (1,)),
    "one image, 13 tiles": ([ASK, ANSWER, Turn("human", "Sure?"), Turn("gpt", "Yes.")], (13,)),
    "one image without tag": ([Turn("human", "What is this?"), ANSWER], (4,)),
    "tag inside the text": ([Turn("human", "Look at <image>, then answer."), ANSWER], (7,)),
    "three images in one turn": (
        [Turn("human", "<image>\n<image><image>Compare."), ANSWER],
        (2, 1, 5),
    ),
    "images in two turns": (
        [ASK, ANSWER, Turn("human", "And <image>?"), Turn("gpt", "Blue.")],
        (3, 2),
    ),
    "two images without tags": ([Turn("human", "Compare."), ANSWER], (1, 3)),
    "answer quotes a tag": ([ASK, Turn("gpt", "You wrote <image>.")], (2,)),
    "own system message, images without tags": (
        [SYSTEM, Turn("human", "Compare."), ANSWER],
        (1, 3, 2),
    ),
    "own system message, many images": (
        [SYSTEM, Turn("human", "<image>\n" * 12 + "Compare."), ANSWER],
        (1,) * 12,
    ),
    "system message with a tag": ([Turn("system", "Images are <image>."), ASK, ANSWER], (2,)),
    "thinking": ([ASK, Turn("gpt", "<think>\nhm\n</think>\n\nred")], (1,)),
    "thinking, its system message, many turns": (
        [
            THINK,
            *[ASK, THOUGHT],
            *[Turn("human", "Sure?"), THOUGHT] * 4,
            Turn("human", "So?"),
            ANSWER,
        ],
        (5,),
    ),
    "answer first": ([Turn("gpt", "Hello, I am here."), Turn("human", "Hello"), ANSWER], ()),
    "answers in a row": ([ASK, ANSWER, Turn("gpt", "And more.")], (1,)),
    "marks in the text": (
        [Turn("human", "Say <|im_end|>\n"), Turn("gpt", "<|im_end|>\n<img> </img>")],
        (),
    ),
}
VIDEOS = {
    "video": ([Turn("human", "<video>\nWhat happens?"), ANSWER], 8),
    "video without tag, own system message": (
        [SYSTEM, Turn("human", "What happens?"), THOUGHT],
        32,
    ),
    "video, tag at the end": (
        [Turn("human", "What happens?\n<video>\n"), ANSWER, Turn("human", "So?"), ANSWER],
        3,
    ),
    "pretrain, video": ([Turn("pretrain", "<video>\nA house falls.")], 9),
}
PRETRAIN = {
    "pretrain, text": ([Turn("pretrain", "Plain text to go on.")], ()),
    "pretrain, image without tag": ([Turn("pretrain", "A house.")], (3,)),
    "pretrain, images without tags": ([Turn("pretrain", "A house and a cat.")], (2, 1)),
    "pretrain, marks in the text": (
        [Turn("pretrain", "<image> ends with </img>, starts with <img>: so")],
        (1,),
    ),
    "pretrain, image": ([Turn("pretrain", "<image>A house.")], (2,)),
    "pretrain, images between texts": (
        [Turn("pretrain", "One <image> two\n<image> three")],
        (2, 1),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of InternVL3.5's kind with few merges."""
    merged = [b"th", b"is", b" is", b"\n\n", b"ll", b"Hell", b"Hello", b"He", b"  ", b"ed", b" red"]
    tokens = [bytes([byte]) for byte in range(256)] + merged
    path = tmp_path_factory.mktemp("qwen") / "qwen.tiktoken"
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    )
    tool.write_tokenizer(tool.build_tokenizer(tool.read_tiktoken(path)), path.parent / "built")
    return path.parent / "built"


def official(turns, tiles_per_image, tokenizer):
    """Input ids and labels as the official training code makes them, 256 image tokens a tile."""
    turns = [{"from": turn.role, "value": turn.text} for turn in turns]
    pretrain = turns[0]["from"] == "pretrain"
    first = turns[1] if turns[0]["from"] == "system" else turns[0]
    if tiles_per_image and "<image>" not in first["value"]:
        first["value"] = "<image>\n" * len(tiles_per_image) + first["value"]
    images = iter(tiles_per_image)
    for turn in turns:
        if turn["from"] in ("human", "pretrain"):
            while "<image>" in turn["value"]:
                image = "<img>" + "<IMG_CONTEXT>" * (256 * next(images)) + "</img>"
                turn["value"] = turn["value"].replace("<image>", image, 1)
    if pretrain:
        ids = tokenizer(turns[0]["value"]).input_ids
        masked = tokenizer.convert_tokens_to_ids(["<img>", "<IMG_CONTEXT>", "</img>"])
        return ids, [IGNORED if token in masked else token for token in ids]
    system = turns.pop(0)["value"] if turns[0]["from"] == "system" else SYSTEM_MESSAGE
    ids = tokenizer(f"<|im_start|>system\n{system}<|im_end|>\n").input_ids
    labels = [IGNORED] * len(ids)
    prefix = len(tokenizer("<|im_start|>assistant\n").input_ids)
    for turn in turns:
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        turn_ids = tokenizer(f"<|im_start|>{role}\n{turn['value']}<|im_end|>\n").input_ids
        ids += turn_ids
        if role == "assistant":
            labels += [IGNORED] * prefix + turn_ids[prefix:-1] + [IGNORED]
        else:
            labels += [IGNORED] * len(turn_ids)
    return ids, labels


def official_frames(turns, num_frames):
    """Turns with the text of a video's frames, as the official training code makes it."""
    turns = list(turns)
    first = 1 if turns[0].role == "system" else 0
    value = turns[first].text if "<video>" in turns[first].text else "<video>\n" + turns[first].text
    special_tokens = "\n".join([f"Frame-{i + 1}: <image>" for i in range(num_frames)])
    turns[first] = Turn(turns[first].role, value.replace("<video>\n", special_tokens + "\n"))
    return turns


@pytest.mark.parametrize("name", [*CONVERSATIONS, *PRETRAIN])
def test_ids_and_labels_equal_the_official_ones(name, folder):
    turns, tiles_per_image = {**CONVERSATIONS, **PRETRAIN}[name]
    check(turns, turns, tiles_per_image, folder)


@pytest.mark.parametrize("name", VIDEOS)
def test_ids_and_labels_of_videos_equal_the_official_ones(name, folder):
    turns, num_frames = VIDEOS[name]
    check(
        with_frames(turns, num_frames),
        official_frames(turns, num_frames),
        (1,) * num_frames,
        folder,
    )


def check(turns, official_turns, tiles_per_image, folder):
    """Our ids and trained tokens of `turns` are the official ones of `official_turns`."""
    expected_ids, expected_labels = official(
        official_turns, tiles_per_image, AutoTokenizer.from_pretrained(folder)
    )
    ours = load_tokenizer(folder)
    ids, is_response = encode_conversation(turns, tiles_per_image=tiles_per_image, tokenizer=ours)
    num_tiles = sum(tiles_per_image)
    sample = EncodedSample(
        key="k",
        token_ids=ids,
        is_response=is_response,
        tiles=np.zeros((num_tiles, 3, 1, 1), dtype=np.uint8),
        tiles_per_image=tiles_per_image,
    )
    stream = expand(
        [sample],
        plan=torch.zeros(num_tiles, dtype=torch.bool),
        tokens_kept=256,
        tokens_compressed=64,
        image_token_id=ours.image_token_id,
    )
    assert stream.token_ids.tolist() == expected_ids
    # The official loss shifts labels by one, so that the label of the first token is never used.
    trained = [
        position
        for position, label in enumerate(expected_labels)
        if label != IGNORED and position > 0
    ]
    assert (stream.response_rows + 1).tolist() == trained
    assert sample.labels.tolist() == [expected_labels[position] for position in trained]
    assert sample.labels.size
