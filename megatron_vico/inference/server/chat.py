"""A request body of chat completions to a conversation: what the field's clients send, checked.

Nothing is fetched: an image comes as a data URL or not at all. Whatever looks like an image in a
text is text.
"""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_vico.data.encode.conversation import THINKING_SYSTEM_MESSAGE
from megatron_vico.data.samples import ConversationSample, Role, Turn
from megatron_vico.inference.server.errors import ApiError

PLACEHOLDER = "<IMAGE_TOKEN>"
"""Where a message's images go in its text, as LMDeploy's clients write."""

IMAGE = "\ufdd0"
"""What stands for an image in turns: no character, and taken out of what clients send."""

MAX_TILES = 64
"""Most tiles that a client may ask for an image; choosing a grid takes the third power of it."""

DETAIL_TILES = {"low": 6, "medium": 12, "high": 24}
"""LMDeploy's tiles for OpenAI's `detail`."""

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "human",
    "assistant": "gpt",
}


class ChatBody(BaseModel):
    """Fields that act here, or that are refused where they would; others are ignored."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    user: str | None = None


@dataclass(frozen=True, kw_only=True)
class TileLimits:
    """How many tiles an image may have where its request does not say."""

    default: int
    by_detail: bool = False
    """Whether `detail` counts; some clients send `low` always, without meaning it."""

    per_request: int | None = None
    """Tiles that the images of a request share; None: each has its own."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation, and the most tiles of each of its images."""

    sample: ConversationSample
    tiles_of_image: tuple[int, ...]


def read_body(content: bytes) -> ChatBody:
    """The fields of a body; ApiError 400 where they are none, or ask for what is not there."""
    try:
        body = ChatBody.model_validate(json.loads(content, parse_constant=_no_number))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(each) for each in first["loc"]) or "body"
        found = str(first["input"])[:100]
        message = f"{where}: {first['msg']}; found {found!r}."
        raise ApiError(400, message, param=where) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON object: {error}.") from None
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    refused = {
        "n": (body.n or 1) != 1,
        "logprobs": bool(body.logprobs or body.top_logprobs),
        "presence_penalty": bool(body.presence_penalty),
        "frequency_penalty": bool(body.frequency_penalty),
        "response_format": (body.response_format or {}).get("type", "text") != "text",
        "tools": bool(body.tools),
        "tool_choice": body.tool_choice not in (None, "none", "auto"),
        "stop": len(stops) > 16 or "" in stops,
        "top_p": body.top_p == 0 and body.temperature != 0,
    }
    for name in (name for name, wrong in refused.items() if wrong):
        found = str(getattr(body, name))[:100]
        raise ApiError(
            400, f"{name} {found!r} is not supported; leave it out or give its default.", param=name
        )
    return body


def read_chat(body: ChatBody, *, limits: TileLimits, suffix: int | None) -> Chat:
    """The conversation of a body's messages.

    Args:
        body: from `read_body`.
        limits: the server's.
        suffix: the tile limit of the model's name, if it has one.

    Raises:
        ApiError: 400, for messages that make no conversation or images that are no data URLs.
    """
    turns, images = list[Turn](), list[tuple[bytes, dict[str, Any]]]()
    for number, message in enumerate(body.messages):
        turn, own = _turn(message, where=f"messages.{number}")
        images += own
        if turns and turns[-1].role == turn.role:
            turns[-1] = Turn(turn.role, f"{turns[-1].text}\n{turn.text}")
        elif turns and turn.role == "system":
            raise ApiError(400, "a system message behind others; it must be the first.")
        else:
            turns.append(turn)
    if turns[-1].role != "human":
        raise ApiError(400, "the last message is not the user's; there is nothing to answer.")
    if (body.chat_template_kwargs or {}).get("enable_thinking") and turns[0].role != "system":
        turns.insert(0, Turn("system", THINKING_SYSTEM_MESSAGE))
    share = MAX_TILES if limits.per_request is None else limits.per_request // max(len(images), 1)
    asked = (body.mm_processor_kwargs or {}).get("max_dynamic_patch")
    tiles = list[int]()
    for _, image in images:
        detail = DETAIL_TILES.get(str(image.get("detail"))) if limits.by_detail else None
        given = (image.get("max_dynamic_patch"), asked, detail, suffix, limits.default)
        most = next(each for each in given if each is not None)
        if type(most) is not int or not 1 <= most <= MAX_TILES:
            raise ApiError(
                400,
                f"max_dynamic_patch is {most!r}; expected 1 to {MAX_TILES} tiles.",
                param="max_dynamic_patch",
            )
        tiles.append(max(1, min(most, share)))
    sample = ConversationSample(
        key="request",
        turns=tuple(turns),
        images=tuple(content for content, _ in images),
        image_tag=IMAGE,
    )
    return Chat(sample=sample, tiles_of_image=tuple(tiles))


def _turn(
    message: dict[str, Any], *, where: str
) -> tuple[Turn, Sequence[tuple[bytes, dict[str, Any]]]]:
    """A message as a turn; its images with what else their `image_url` says."""
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        raise ApiError(
            400,
            f"{where}: role {str(message.get('role'))[:40]!r}; expected system, user or assistant.",
            param=f"{where}.role",
        )
    content = message.get("content")
    if content is None and role == "gpt":
        content = ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict | str) for part in parts):
        raise ApiError(
            400,
            f"{where}: content is neither a text nor a list of parts.",
            param=f"{where}.content",
        )
    texts, images, pieces = list[str](), list[tuple[bytes, dict[str, Any]]](), list[str]()
    kind = ""
    for number, part in enumerate(parts):
        before, (kind, value) = kind, _part(part, where=f"{where}.content.{number}")
        if kind == "text":
            texts.append(value)
            pieces += ["\n", value] if before == "text" else [value]
        elif role == "human":
            images.append(_image(value, where=f"{where}.content.{number}"))
            pieces.append(f"{IMAGE}\n")
        else:
            raise ApiError(400, f"{where}: an image in a message that is not the user's.")
    text = "".join(pieces)
    if role == "human" and any(PLACEHOLDER in each for each in texts):
        text = "\n".join(texts)
        if text.count(PLACEHOLDER) != len(images):
            raise ApiError(
                400,
                f"{where}: {text.count(PLACEHOLDER)} {PLACEHOLDER} but {len(images)} images; give"
                " one for each image, or none at all.",
            )
        text = text.replace(PLACEHOLDER, IMAGE)
    return Turn(role, text), images


def _part(part: Any, *, where: str) -> tuple[str, Any]:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    # vLLM's clients may leave the type out.
    kind = part.get("type") or next((name for name in ("text", "image_url") if name in part), None)
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        # Half a surrogate pair is no text, and IMAGE is ours.
        text = part["text"].encode("utf-8", "replace").decode()
        return "text", text.replace(IMAGE, "\ufffd")
    if kind == "image_url":
        return "image_url", part.get("image_url")
    if kind in ("video_url", "video"):
        raise ApiError(
            400, f"{where}: {kind} is not read here; send the video's frames as image_url parts."
        )
    raise ApiError(
        400, f"{where}: part of type {str(kind)[:40]!r}; expected text or image_url.", param=where
    )


def _image(value: Any, *, where: str) -> tuple[bytes, dict[str, Any]]:
    image = {"url": value} if isinstance(value, str) else value
    url = image.get("url") if isinstance(image, dict) else None
    if not isinstance(url, str):
        raise ApiError(400, f"{where}: image_url has no url; give a data URL.", param=where)
    head, comma, payload = url.partition(",")
    if not head.startswith("data:") or not comma or not head.endswith(";base64"):
        raise ApiError(
            400,
            f"{where}: image_url begins with {url[:24]!r}; expected data:image/png;base64,... (the"
            " server fetches nothing: read the file and send what is in it).",
            param=where,
        )
    try:
        padding = "=" * (-len(payload) % 4)
        return base64.b64decode(payload + padding, validate=True), image
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where}: image_url is no base64: {error}.", param=where) from None


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")
