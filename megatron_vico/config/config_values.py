"""Whether what a config.json states can be a model's: each value by itself, and all together."""

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from megatron_vico.config.registry import LanguageConfig, ModelConfig, VisionConfig

_KINDS = {
    "model": get_type_hints(ModelConfig),
    "vision": get_type_hints(VisionConfig),
    "language": get_type_hints(LanguageConfig),
}
# Greatest values that make sense: what is larger would overflow, or take hours to list its tensors.
_MOST = {"num_layers": 1024, "num_experts": 1024, "norm_eps": 1, "rope_theta": 1 << 36}
_MOST_OF_OTHERS = 1 << 24


def not_of_kind(stated: dict[str, Any]) -> Iterator[str]:
    """What is not of its field's kind: JSON takes NaN, and Python true for 1.

    Args:
        stated: `part.field` of a ModelConfig -> value.
    """
    for name, value in stated.items():
        part, field = name.split(".")
        kind = _KINDS[part][field]
        most, least = _MOST.get(field, _MOST_OF_OTHERS), 0 if field == "image_token_id" else 1
        number = not isinstance(value, bool) and isinstance(value, int | float)
        if kind is bool:
            fits, expected = isinstance(value, bool), "true or false"
        elif kind is float:
            fits = number and 0 < value <= most
            expected = f"a number above 0, at most {most}"
        elif kind in (int, int | None):
            fits = (value is None and kind is not int) or (
                number and isinstance(value, int) and least <= value <= most
            )
            expected = f"a whole number from {least} to {most}"
        else:  # norm_type
            fits, expected = value in get_args(kind), " or ".join(map(repr, get_args(kind)))
        if not fits:
            yield f"{name} is {value!r:.80}, expected {expected}"


def unsound(model: ModelConfig) -> Iterator[str]:
    """Numbers that do not go together in the modules."""
    vision, language = model.vision, model.language
    for what, number, divisor, reason in (
        ("vision.hidden_size", vision.hidden_size, vision.num_heads, "num_heads"),
        ("vision.hidden_size", vision.hidden_size, model.vir_num_heads, "vir_num_heads"),
        ("vision.image_size", vision.image_size, 4 * vision.patch_size, "4 x patch_size"),
        ("language.num_heads", language.num_heads, language.num_query_groups, "num_query_groups"),
        ("language.head_dim", language.head_dim, 2, "the two halves that rotate"),
        ("language.rope_theta", language.rope_theta, 1, "whole numbers"),
    ):
        if number % divisor:
            yield f"{what} is {number}, expected a multiple of {divisor} ({reason})"
    if model.image_token_id >= language.vocab_size:
        yield (
            f"image_token_id is {model.image_token_id}, expected less than"
            f" vocab_size {language.vocab_size}"
        )
    if language.num_experts is not None and language.moe_top_k > language.num_experts:
        yield (
            f"language.moe_top_k is {language.moe_top_k}, expected at most num_experts"
            f" {language.num_experts}"
        )
