"""Turns to ids and response mask by the official `internvl2_5` template, which InternVL3.5 uses.

Each turn is tokenised by itself. Only answers and their `<|im_end|>` are trained. Here an image is
`<img>`, ONE `<IMG_CONTEXT>` per tile, `</img>`; data/encode/expand.py repeats it once a compression
plan exists.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_vico.data.encode.tokenizer import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    TURN_END,
    TURN_START,
    Tokenizer,
)
from megatron_vico.data.samples import BoolArray, IntArray, Turn
from megatron_vico.errors import SampleError

TileTags = Literal["none", "numbered"]

IMAGE_TAG = "<image>"
ASSISTANT_PREFIX = f"{TURN_START}assistant\n"
# The official message, Chinese as the released models saw it in training, written in escapes to
# keep the file ASCII: "I am Shusheng Wanxiang, in English InternVL, a multimodal model by Shanghai
# AI Laboratory, Tsinghua and others."
DEFAULT_SYSTEM_MESSAGE = (
    "\u4f60\u662f\u4e66\u751f\u00b7\u4e07\u8c61\uff0c\u82f1\u6587\u540d\u662fInternVL\uff0c\u662f\u7531"
    "\u4e0a\u6d77\u4eba\u5de5\u667a\u80fd\u5b9e\u9a8c\u5ba4\u3001\u6e05\u534e\u5927\u5b66\u53ca"
    "\u591a\u5bb6\u5408\u4f5c\u5355\u4f4d\u8054\u5408\u5f00\u53d1\u7684"
    "\u591a\u6a21\u6001\u5927\u8bed\u8a00\u6a21\u578b\u3002"
)
# Of the official model cards: R1_SYSTEM_PROMPT.
THINKING_SYSTEM_MESSAGE = """\
You are an AI assistant that rigorously follows this response protocol:

1. First, conduct a detailed analysis of the question. Consider different angles, potential \
solutions, and reason through the problem step-by-step. Enclose this entire thinking process \
within <think> and </think> tags.

2. After the thinking section, provide a clear, concise, and direct answer to the user's question. \
Separate the answer from the think section with a newline.

Ensure that the thinking process is thorough but remains focused on the query. The final answer \
should be standalone and not reference the thinking section."""


def encode_conversation(
    turns: Sequence[Turn],
    *,
    tiles_per_image: Sequence[int],
    tokenizer: Tokenizer,
    tile_tags: TileTags = "none",
    key: str = "",
) -> tuple[IntArray, BoolArray]:
    """Ids [L] and response mask [L] of a conversation with its answers.

    Trained are each `gpt` turn's text and `<|im_end|>`, but neither `<|im_start|>assistant\\n` nor
    the last newline; of a `pretrain` conversation, everything outside images but its first token
    (which nothing predicts).

    Args:
        turns: the conversation; a missing system turn is added with the official default.
        tiles_per_image: in the order of the `<image>` tags.
        tile_tags: "numbered" puts `<tile_i>` before each tile of an image.

    Raises:
        SampleError: if tags and images do not match, roles are out of order, or there is no answer
            or an empty one.
    """
    _check_turns(turns, key)
    for number, turn in enumerate(turns):
        if IMAGE_CONTEXT in turn.text:
            raise SampleError(
                f"sample {key!r}: turn {number + 1} contains {IMAGE_CONTEXT}; use {IMAGE_TAG} tags."
            )
    pieces = _split_at_images(turns, tiles_per_image, tile_tags, IMAGE_TAG, key)
    placed = [Turn(turn.role, "".join(texts)) for turn, texts in zip(turns, pieces, strict=True)]
    if placed[0].role == "pretrain":
        return _encode_pretrain(placed[0].text, tile_tags, tokenizer)
    if not any(turn.role == "gpt" for turn in turns):
        raise SampleError(f"sample {key!r}: no answer to train on; add a turn from 'gpt'.")
    for number, turn in enumerate(turns):
        if turn.role == "gpt" and not turn.text.strip():
            raise SampleError(
                f"sample {key!r}: turn {number + 1} is an empty answer; remove the turn or the"
                " sample."
            )
    prefix_len = len(tokenizer.encode_fixed(ASSISTANT_PREFIX))
    token_ids: list[int] = []
    is_response: list[bool] = []
    if placed[0].role != "system":
        placed.insert(0, Turn("system", DEFAULT_SYSTEM_MESSAGE))
    for turn in placed:
        ids = _encode_turn(turn, tokenizer)
        token_ids += ids
        if turn.role == "gpt":
            num_trained = len(ids) - prefix_len - 1
            is_response += [False] * prefix_len + [True] * num_trained + [False]
        else:
            is_response += [False] * len(ids)
    return np.array(token_ids, dtype=np.int64), np.array(is_response, dtype=np.bool_)


def encode_prompt(
    turns: Sequence[Turn],
    *,
    tiles_per_image: Sequence[int],
    tokenizer: Tokenizer,
    tile_tags: TileTags = "none",
    image_tag: str = IMAGE_TAG,
    key: str = "",
) -> list[IntArray]:
    """Ids that the model reads before each of its answers.

    It answers the last turn, and wherever the next turn is a question too; `gpt` turns are answers
    that were given before. Each part ends with `<|im_start|>assistant\\n`; all but the first begin
    behind an answer's `<|im_end|>`. Special strings are text: only `image_tag` stands for an image.

    Raises:
        SampleError: if tags and images do not match, or the last turn is not a question.
    """
    _check_turns(turns, key)
    if turns[-1].role != "human":
        raise SampleError(
            f"sample {key!r}: a prompt ends with role {turns[-1].role!r}; expected 'human'."
        )
    prefix, newline = tokenizer.encode_fixed(ASSISTANT_PREFIX), tokenizer.encode_fixed("\n")
    parts = list[IntArray]()
    token_ids, last_role = list[int](), ""
    system = [] if turns[0].role == "system" else [("system", [DEFAULT_SYSTEM_MESSAGE])]
    pieces = _split_at_images(turns, tiles_per_image, tile_tags, image_tag, key)
    roles = [turn.role for turn in turns]
    for role, texts in [*system, *zip(roles, pieces, strict=True)]:
        if role == last_role == "human":
            parts.append(np.array([*token_ids, *prefix], dtype=np.int64))
            token_ids = [*newline]
        speaker = {"human": "user", "gpt": "assistant"}.get(role, role)
        token_ids += tokenizer.encode_fixed(TURN_START)
        for index, text in enumerate((f"{speaker}\n{texts[0]}", *texts[1:])):
            token_ids += tokenizer.encode(text) if index % 2 else tokenizer.encode_literal(text)
        token_ids += [tokenizer.eos_id, *newline]
        last_role = role
    return [*parts, np.array([*token_ids, *prefix], dtype=np.int64)]


def _encode_turn(turn: Turn, tokenizer: Tokenizer) -> Sequence[int]:
    if turn.role == "system":
        return tokenizer.encode_fixed(f"{TURN_START}system\n{turn.text}{TURN_END}\n")
    speaker = "user" if turn.role == "human" else "assistant"
    return tokenizer.encode(f"{TURN_START}{speaker}\n{turn.text}{TURN_END}\n")


def _encode_pretrain(text: str, tile_tags: str, tokenizer: Tokenizer) -> tuple[IntArray, BoolArray]:
    token_ids = np.array(tokenizer.encode(text), dtype=np.int64)
    start, end = tokenizer.token_id(IMAGE_START), tokenizer.token_id(IMAGE_END)
    is_response = ~np.isin(token_ids, (start, tokenizer.image_token_id, end))
    if tile_tags == "numbered":
        # No part of the official template: the tags within an image are not trained either.
        is_response &= np.cumsum(token_ids == start) == np.cumsum(token_ids == end)
    is_response[:1] = False
    return token_ids, is_response


def _check_turns(turns: Sequence[Turn], key: str) -> None:
    roles = [turn.role for turn in turns]
    if not roles:
        raise SampleError(f"sample {key!r}: the conversation is empty; expected at least one turn.")
    if "pretrain" in roles and len(roles) > 1:
        raise SampleError(
            f"sample {key!r}: a 'pretrain' turn among {len(roles)} turns; it must be the only one."
        )
    if "system" in roles[1:]:
        raise SampleError(
            f"sample {key!r}: turn {roles.index('system', 1) + 1} is from 'system'; it must be the"
            " first."
        )


def _split_at_images(
    turns: Sequence[Turn],
    tiles_per_image: Sequence[int],
    tile_tags: str,
    image_tag: str,
    key: str,
) -> list[list[str]]:
    """The texts of each turn and between them its images: text, image, text, ..., text.

    Without a tag, images precede the first question; where there is no image, the tag is text, as
    in the official code. Only questions and `pretrain` texts are searched. The official code puts
    tags before the first question also when a later one has them, and then leaves the later tags as
    plain text; here tags stay where the data has them.
    """
    texts = [turn.text for turn in turns]
    if not tiles_per_image:
        return [[text] for text in texts]
    holders = [number for number, turn in enumerate(turns) if turn.role in ("human", "pretrain")]
    num_tags = sum(texts[number].count(image_tag) for number in holders)
    if num_tags == 0 and holders:
        num_tags = len(tiles_per_image)
        texts[holders[0]] = f"{image_tag}\n" * num_tags + texts[holders[0]]
    if num_tags != len(tiles_per_image):
        raise SampleError(
            f"sample {key!r}: {num_tags} {image_tag} tags but {len(tiles_per_image)} images; "
            "give one tag for each image, in order, or no tag at all."
        )
    images = (_image_text(num_tiles, tile_tags) for num_tiles in tiles_per_image)
    split = list[list[str]]()
    for number, text in enumerate(texts):
        first, *rest = text.split(image_tag) if number in holders else [text]
        split.append([first, *(part for piece in rest for part in (next(images), piece))])
    return split


def _image_text(num_tiles: int, tile_tags: str) -> str:
    tags = (f"<tile_{i}>" if tile_tags == "numbered" else "" for i in range(1, num_tiles + 1))
    return IMAGE_START + "".join(tag + IMAGE_CONTEXT for tag in tags) + IMAGE_END
