"""What tokenizer files need beyond the tokenizer to be served: chat template, names of tokens."""

from pathlib import Path

from megatron_vico.data.encode.conversation import DEFAULT_SYSTEM_MESSAGE
from megatron_vico.data.encode.tokenizer import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    TURN_END,
    TURN_START,
)
from megatron_vico.files import read_json, write_json, write_text

# The template of training (data/encode/conversation.py), its system message too. A message is a
# text, or a list of parts as transformers' processors take it; those put tiles in place of the
# image token.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    f"{{{{- '{TURN_START}system\\n{DEFAULT_SYSTEM_MESSAGE}{TURN_END}\\n' -}}}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    f"{{{{- '{TURN_START}' + message['role'] + '\\n' -}}}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    f"{{%- if part['type'] == 'image' -%}}{{{{- '{IMAGE_CONTEXT}\\n' -}}}}"
    "{%- elif part['type'] == 'video' -%}{{- '<video>\\n' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    f"{{{{- '{TURN_END}\\n' -}}}}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{TURN_START}assistant\\n' -}}}}{{%- endif -%}}"
)

_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
# What transformers' InternVLProcessor asks its tokenizer for.
_NAMED_TOKENS = {
    "start_image_token": IMAGE_START,
    "end_image_token": IMAGE_END,
    "context_image_token": IMAGE_CONTEXT,
    "video_token": "<video>",
}


def complete_tokenizer(folder: Path, *, native: bool, written_for_it: bool) -> None:
    """Add what is missing; a folder without a tokenizer stays as it is.

    `native`: for transformers' own InternVL, whose processor has images in the chat template;
    `written_for_it`: the files are those of a folder in the same form.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    config = read_json(path)
    before = dict(config)
    if native:
        named = config.get("extra_special_tokens")
        config["extra_special_tokens"] = _NAMED_TOKENS | (named if isinstance(named, dict) else {})
    has_template = "chat_template" in config or any(
        (folder / name).exists() for name in _TEMPLATE_FILES
    )
    # A text-only template, as the other layouts have, would drop the images.
    if not has_template or (native and not written_for_it):
        config.pop("chat_template", None)
        (folder / _TEMPLATE_FILES[1]).unlink(missing_ok=True)
        write_text(folder / _TEMPLATE_FILES[0], CHAT_TEMPLATE + "\n")
    if config != before:
        write_json(path, config)
