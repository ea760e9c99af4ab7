"""Configuration of InternVL3.5 and InternVL3.5-Flash, for `trust_remote_code`.

The fields are those of the released config.json files. Three are not: `vir_num_heads`,
`img_context_token_id` and `flash_decision_rule`, whose defaults are what the released models do.
From megatron_vico, Apache-2.0.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

_VISION_FIELDS: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "qk_normalization": False,
    "initializer_factor": 0.1,
    "initializer_range": 0.02,
}
_CHAT_FIELDS: dict[str, Any] = {
    "select_layer": -1,
    "force_image_size": 448,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "template": "internvl2_5",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "img_context_token_id": 151671,
    "tie_word_embeddings": False,
    "flash_mode": None,
    "flash_relative_threshold": None,
    "flash_absolute_threshold": None,
    "flash_decision_rule": "flash",
    "vir_num_heads": 16,
}
# What the model code has one form of; another value would be ignored in silence.
_FIXED = {"select_layer": -1, "ps_version": "v2"}


class InternVisionConfig(PretrainedConfig):
    """An InternViT tower; the defaults are those of InternViT-300M-448px-V2.5."""

    model_type = "intern_vit_6b"  # of both towers, in all releases
    base_config_key = "vision_config"

    def __init__(self, **fields: Any) -> None:
        """Args: fields: of `vision_config` in config.json.

        Raises:
            ValueError: if the tower is of a kind that the model code does not have.
        """
        _take(self, fields, _VISION_FIELDS)
        if self.norm_type not in ("layer_norm", "rms_norm"):
            raise ValueError(
                f"norm_type is {self.norm_type!r}, expected 'layer_norm' or 'rms_norm'."
            )
        if self.hidden_act != "gelu":
            raise ValueError(
                f"hidden_act of the vision tower is {self.hidden_act!r}, expected 'gelu'."
            )
        super().__init__(**fields)


class InternVLChatConfig(PretrainedConfig):
    """The whole model: tower, connectors, router and language model.

    `flash_mode` is true for Flash models, false for one that is to compress nothing, and unset for
    plain InternVL3.5, which has neither router nor 64-token connector: as lmdeploy reads it.
    """

    model_type = "internvl_chat"
    sub_configs = {"vision_config": InternVisionConfig, "llm_config": AutoConfig}  # noqa: RUF012 (transformers' form)

    def __init__(self, vision_config: Any = None, llm_config: Any = None, **fields: Any) -> None:
        """Make a configuration from what config.json says.

        Args:
            vision_config: fields of the tower.
            llm_config: fields of the language model, with its model_type; unset, a Qwen3 one.
            fields: the rest.

        Raises:
            ValueError: if a field has a value that the model code cannot serve.
        """
        _take(self, fields, _CHAT_FIELDS)
        for name, expected in _FIXED.items():
            if getattr(self, name) != expected:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; this model code has {expected!r} only."
                )
        if self.flash_decision_rule not in ("paper", "flash"):
            raise ValueError(
                f"flash_decision_rule is {self.flash_decision_rule!r}, expected 'paper' or 'flash'."
            )
        thresholds = (self.flash_relative_threshold, self.flash_absolute_threshold)
        if self.flash_mode and self.flash_decision_rule == "flash" and None in thresholds:
            raise ValueError(
                "flash_mode is on, but flash_relative_threshold or flash_absolute_threshold is"
                " not in config.json; set both, or set flash_decision_rule to 'paper'."
            )
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = InternVisionConfig(**(vision_config or {}))
        if not isinstance(llm_config, PretrainedConfig):
            llm_config = AutoConfig.for_model(**({"model_type": "qwen3"} | (llm_config or {})))
        self.vision_config, self.llm_config = vision_config, llm_config
        super().__init__(**fields)

    def get_text_config(self, *_: Any, **__: Any) -> PretrainedConfig:
        """The language model's configuration, wherever transformers asks for the part that handles
        text."""
        return self.llm_config

    @property
    def num_image_token(self) -> int:
        """Visual tokens of a kept tile: 256 at 448 px."""
        return (self.force_image_size // self.vision_config.patch_size // self.shuffle_ratio) ** 2

    @property
    def num_image_token_compressed(self) -> int:
        """Visual tokens of a compressed tile: a quarter of a kept one's, 64 at 448 px."""
        return self.num_image_token // 4

    @property
    def shuffle_ratio(self) -> int:
        """Side of the square of patches that makes one visual token of a kept tile."""
        return round(1 / self.downsample_ratio)


def _take(config: PretrainedConfig, fields: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Move the fields that have defaults from `fields` to attributes of `config`."""
    for name, default in defaults.items():
        setattr(config, name, fields.pop(name, default))
