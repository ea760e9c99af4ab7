"""Which conversation a body's messages make, and what is refused of them."""

import base64
import json
from typing import Any

import pytest

from megatron_vico.inference.server.chat import IMAGE, Chat, TileLimits, read_body, read_chat
from megatron_vico.inference.server.errors import ApiError
from megatron_vico.inference.server.models import Models
from tests.unit.inference.conftest import PLANS, body, data_url, image_part, plan

LIMITS = TileLimits(default=4)


def chat(fields: dict[str, Any], *, limits: TileLimits = LIMITS, suffix: int | None = None) -> Chat:
    return read_chat(read_body(json.dumps(fields).encode()), limits=limits, suffix=suffix)


def text(*content: Any) -> str:
    (turn,) = chat(body(*content)).sample.turns
    return turn.text


def part(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_images_are_where_their_parts_are() -> None:
    image = image_part()
    assert text(image, part("What?")) == f"{IMAGE}\nWhat?"
    assert text(part("a"), image, part("b"), part("c")) == f"a{IMAGE}\nb\nc"
    bare = {"type": "image_url", "image_url": data_url(8, 8)}
    untyped = {"image_url": {"url": data_url(8, 8)}}
    assert text(bare, untyped, {"text": "x"}, "y") == f"{IMAGE}\n{IMAGE}\nx\ny"


def test_placeholders_say_where_images_are() -> None:
    image = image_part()
    words = "Image-1: <IMAGE_TOKEN>\nImage-2: <IMAGE_TOKEN>\nWhich?"
    assert text(image, image, part(words)) == words.replace("<IMAGE_TOKEN>", IMAGE)
    with pytest.raises(ApiError, match="2 <IMAGE_TOKEN> but 1 images"):
        text(image, part(words))


def test_nothing_else_in_a_text_is_an_image() -> None:
    words = "<image> <img><IMG_CONTEXT></img>"
    sample = chat(body(part(f"{words}{IMAGE}\ud800"), image_part())).sample
    assert sample.turns[0].text == f"{words}\ufffd?{IMAGE}\n"
    assert len(sample.images) == 1


def test_turns() -> None:
    fields = body()
    fields["messages"] = [
        {"role": "developer", "content": "Be."},
        {"role": "system", "content": [part("Brief.")]},
        {"role": "user", "content": "a"},
        {"role": "user", "content": [part("b"), image_part()]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "<IMAGE_TOKEN>"[:5]},
    ]
    turns = [(turn.role, turn.text) for turn in chat(fields).sample.turns]
    assert turns == [
        ("system", "Be.\nBrief."),
        ("human", f"a\nb{IMAGE}\n"),
        ("gpt", ""),
        ("human", "<IMAG"),
    ]
    thinking = chat(body(chat_template_kwargs={"enable_thinking": True})).sample.turns
    assert [turn.role for turn in thinking] == ["system", "human"]
    assert "<think>" in thinking[0].text


@pytest.mark.parametrize(
    ("image", "fields", "suffix", "limits", "expected"),
    [
        ({}, {}, None, LIMITS, 4),
        ({}, {}, 24, LIMITS, 24),
        ({"detail": "high"}, {}, 5, LIMITS, 5),
        ({"detail": "low"}, {}, 5, TileLimits(default=4, by_detail=True), 6),
        ({"detail": "auto"}, {}, None, TileLimits(default=4, by_detail=True), 4),
        ({}, {"mm_processor_kwargs": {"max_dynamic_patch": 7}}, 5, LIMITS, 7),
        (
            {"max_dynamic_patch": 9, "detail": "low"},
            {"mm_processor_kwargs": {"max_dynamic_patch": 7}},
            5,
            TileLimits(default=4, by_detail=True),
            9,
        ),
        ({"max_dynamic_patch": 9}, {}, None, TileLimits(default=4, per_request=8), 4),
    ],
)
def test_whose_tile_limit_counts(
    image: dict[str, Any],
    fields: dict[str, Any],
    suffix: int | None,
    limits: TileLimits,
    expected: int,
) -> None:
    both = body(image_part(**image), image_part(**image), part("?"), **fields)
    assert chat(both, limits=limits, suffix=suffix).tiles_of_image == (expected, expected)


@pytest.mark.parametrize("padding", ["", "=", "=="])
def test_missing_padding_is_added(padding: str) -> None:
    content = b"1234567"[: 7 - len(padding)]
    encoded = base64.b64encode(content).decode().rstrip("=")
    part = {"type": "image_url", "image_url": f"data:image/gif;base64,{encoded}"}
    assert chat(body(part)).sample.images == (content,)


MESSAGES: list[tuple[Any, str]] = [
    ([], "messages: List should have at least 1 item"),
    ([3], "messages.0: Input should be a valid dictionary"),
    ([{"role": "cat", "content": "x"}], "role 'cat'; expected system, user or assistant"),
    ([{"role": "user"}], "content is neither a text nor a list"),
    ([{"role": "user", "content": [3]}], "content is neither"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "type 'audio'"),
    ([{"role": "user", "content": [{"type": "video_url"}]}], "send the video's frames"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "has no url"),
    ([{"role": "assistant", "content": "x"}], "last message is not the user's"),
    ([{"role": "system", "content": [image_part()]}], "not the user's"),
    (
        [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
        "must be the first",
    ),
    *(
        ([{"role": "user", "content": [{"type": "image_url", "image_url": url}]}], message)
        for url, message in (
            ("http://169.254.169.254/latest", "begins with 'http://169.254.169.254/l'; expected"),
            ("file:///etc/passwd", "begins with 'file:///etc/passwd'; expected data:"),
            ("data:image/png,abc", "expected data:image/png;base64"),
            ("data:image/png;base64,@@@", "no base64"),
            ("data:image/png;base64,AAAAA", "no base64"),
        )
    ),
]


@pytest.mark.parametrize(("messages", "message"), MESSAGES)
def test_messages_that_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message) as error:
        chat(body() | {"messages": messages})
    assert error.value.status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *(({name: -1}, name) for name in ("max_tokens", "max_completion_tokens", "temperature")),
        *(({name: 1.5}, name) for name in ("top_p", "min_p", "seed", "max_tokens")),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
        ({"seed": 1 << 64}, "seed"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 3}, "stop.str"),
        ({"model": None}, "model"),
        ({"mm_processor_kwargs": {"max_dynamic_patch": 10**9}}, "max_dynamic_patch"),
        ({"mm_processor_kwargs": {"max_dynamic_patch": True}}, "max_dynamic_patch"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        chat(body(image_part(), **fields))
    assert (error.value.status, error.value.param) == (400, param)


def test_fields_that_do_nothing_are_taken() -> None:
    nothing: dict[str, Any] = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "user": "me",
        "top_p": 0,
        "some_new_field": {"deep": 1},
    }
    assert read_body(json.dumps(body(**nothing)).encode()).model_extra == {
        "some_new_field": {"deep": 1}
    }


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"a": NaN}', b"\xff", b"[" * 100_000, b"null", b'"x"']
)
def test_bodies_that_are_no_object(content: bytes) -> None:
    with pytest.raises(ApiError) as error:
        read_body(content)
    assert error.value.status == 400


@pytest.mark.parametrize(
    ("name", "plan_name", "tiles"),
    [
        ("internvl", "vir", None),
        ("internvl@none", "none", None),
        ("internvl@random=0.3+tiles=24", "random=0.3", 24),
        ("internvl+tiles=1", "vir", 1),
    ],
)
def test_names_of_models(name: str, plan_name: str, tiles: int | None) -> None:
    models = Models("internvl", PLANS, read_plan=plan)
    found = models.find(name)
    assert (found.name, found.plan_name, found.max_tiles) == (name, plan_name, tiles)


@pytest.mark.parametrize("suffix", ["", "+tiles=24"])
@pytest.mark.parametrize(
    "name", ["", "gpt", "gpt@vir", "internvl@x", "internvl@random=2", "\ud800"]
)
def test_names_of_nothing(name: str, suffix: str) -> None:
    models = Models("internvl", PLANS, read_plan=plan)
    with pytest.raises(ApiError, match="does not exist") as error:
        models.find(name + suffix)
    assert (error.value.status, error.value.code) == (404, "model_not_found")
    assert models.label(name + suffix) == "internvl@other"


@pytest.mark.parametrize("tiles", ["", "x", "0", "65", "1e9"])
def test_tile_limits_of_names_that_are_none(tiles: str) -> None:
    with pytest.raises(ApiError, match="does not exist"):
        Models("internvl", PLANS, read_plan=plan).find(f"internvl@vir+tiles={tiles}")


@pytest.mark.parametrize("served", ["vico4b-o1", "GPT-5", "a@b", "a/b", ""])
def test_names_that_harnesses_take_for_others(served: str) -> None:
    with pytest.raises(ValueError, match="--served-model-name"):
        Models(served, PLANS, read_plan=plan)
