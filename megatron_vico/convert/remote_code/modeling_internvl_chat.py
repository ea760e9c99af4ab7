"""InternVL3.5 and InternVL3.5-Flash for `AutoModel.from_pretrained(DIR, trust_remote_code=True)`.
For inference.

    model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)
    answer = model.chat(tokenizer, model.load_image("page.png"), "What is the total?",
    {"max_new_tokens": 64}) model.compressed_tiles # the tiles that the router gave 64 visual tokens
    instead of 256

With `flash_mode` in config.json a router (ViR) decides for each tile; without it, this is plain
InternVL3.5. Where it is false, router and mlp2 are there, so that no weight is lost, and nothing is
compressed unless a plan says so. Module names are those of the released checkpoints.
Shapes: B conversations, S tokens, N tiles, P patches of a tile, Q visual tokens of a tile, V visual
tokens of all tiles, D channels of the vision tower, H of the language model. From megatron_vico,
Apache-2.0.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_internvl_chat import InternVLChatConfig
from .image_tiles import load_image
from .modeling_intern_vit import InternVisionEmbeddings, InternVisionEncoderLayer, InternVisionModel
from .modeling_vir import RouterGating, RouterPooling

IMAGE_TAG = "<image>"
IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
# The official message, in escapes to keep this file ASCII: "I am Shusheng Wanxiang, in English
# InternVL, a multimodal model by Shanghai AI Laboratory, Tsinghua and others."
SYSTEM_MESSAGE = (
    "\u4f60\u662f\u4e66\u751f\u00b7\u4e07\u8c61\uff0c\u82f1\u6587\u540d\u662fInternVL\uff0c\u662f\u7531"
    "\u4e0a\u6d77\u4eba\u5de5\u667a\u80fd\u5b9e\u9a8c\u5ba4\u3001\u6e05\u534e\u5927\u5b66\u53ca"
    "\u591a\u5bb6\u5408\u4f5c\u5355\u4f4d\u8054\u5408\u5f00\u53d1\u7684"
    "\u591a\u6a21\u6001\u5927\u8bed\u8a00\u6a21\u578b\u3002"
)


class InternVLChatModel(PreTrainedModel):
    """Vision tower, connectors (mlp1: 256 visual tokens a tile, mlp2: 64), router and language
    model."""

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["InternVisionEncoderLayer", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer"]  # noqa: RUF012
    # The tower always uses torch's own attention; these speak for the language model.
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: InternVLChatConfig) -> None:
        """Args: config: of the export."""
        super().__init__(config)
        vision, language = config.vision_config.hidden_size, config.llm_config.hidden_size
        shuffled = config.shuffle_ratio**2 * vision
        self.vision_model = InternVisionModel(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(config.llm_config)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(shuffled),
            nn.Linear(shuffled, language),
            nn.GELU(),
            nn.Linear(language, language),
        )
        if config.flash_mode is not None:
            self.mlp2 = nn.Sequential(
                nn.LayerNorm(4 * shuffled),
                nn.Linear(4 * shuffled, 2 * language),
                nn.GELU(),
                nn.Dropout(0.1),
                nn.Linear(2 * language, 2 * language),
                nn.GELU(),
                nn.Dropout(0.1),
                nn.Linear(2 * language, language),
            )
            self.pooling_before_gating = RouterPooling(vision, config.vir_num_heads)
            self.gating = RouterGating(vision)
        self.num_image_token = config.num_image_token
        self.img_context_token_id = config.img_context_token_id
        self.system_message = SYSTEM_MESSAGE
        self.compressed_tiles: Tensor | None = None
        """[N] bool: what the last forward, generate or chat compressed."""
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', but a tensor that the files do not hold is an error and not a fresh
        random one.

        Raises:
            ValueError: if tensors are missing. transformers 5.0 to 5.3 do not find experts, which
                they keep fused.
        """
        model, loading = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(loading["missing_keys"])
        if missing:
            fix = (
                "use transformers 5.4 or later"
                if "experts" in missing[0]
                else "the checkpoint is not whole"
            )
            raise ValueError(
                f"{len(missing)} tensors were not found, {missing[0]} and others; {fix}."
            )
        return (model, loading) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InternVisionEmbeddings):
            nn.init.normal_(module.class_embedding)
            nn.init.normal_(module.position_embedding)
        elif isinstance(module, InternVisionEncoderLayer):
            nn.init.constant_(module.ls1, self.config.vision_config.initializer_factor)
            nn.init.constant_(module.ls2, self.config.vision_config.initializer_factor)
        elif isinstance(module, RouterPooling):
            nn.init.normal_(module.query_token)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Args: value: for the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_output_embeddings()

    # Images.

    def load_image(self, image: Any, max_num: int | None = None) -> Tensor:
        """Tiles of one image, as the configuration says.

        Args:
            image: path of a file, or a PIL image.
            max_num: most tiles, thumbnail not counted; unset, max_dynamic_patch.

        Returns:
            [N, 3, S, S], normalised, on the model's device and in its dtype.
        """
        config = self.config
        dynamic = config.dynamic_image_size
        tiles = load_image(
            image,
            image_size=config.force_image_size,
            min_num=config.min_dynamic_patch if dynamic else 1,
            max_num=(max_num or config.max_dynamic_patch) if dynamic else 1,
            use_thumbnail=config.use_thumbnail,
        )
        return tiles.to(self.device, self.dtype)

    def load_images(self, images: Sequence[Any]) -> tuple[Tensor, list[int]]:
        """Tiles of several images of one conversation, which share the budget of tiles as in
        training.

        Args:
            images: at least one path or PIL image.

        Returns:
            [N, 3, S, S], and `num_patches_list`: the tiles of each image.
        """
        max_num = max(1, self.config.max_dynamic_patch // len(images))
        tiles = [self.load_image(image, max_num) for image in images]
        return torch.cat(tiles), [len(each) for each in tiles]

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens of tiles, none compressed: [N, 3, S, S] to [N, Q, H]."""
        tokens: Tensor = self.mlp1(
            pixel_shuffle(self.vision_model(pixel_values), self.config.shuffle_ratio)
        )
        return tokens

    def compress_probability(self, features_NPD: Tensor) -> Tensor:
        """How sure the router is that a tile may be compressed.

        Args:
            features_NPD: [N, P, D], outputs of the vision tower.

        Returns:
            [N] float32 in [0, 1].
        """
        logits_N2 = self.gating(self.pooling_before_gating(features_NPD))
        # In float32 whatever the weights are: rounded probabilities tie, and a tie with the
        # quantile is not compressed.
        return logits_N2.float().softmax(dim=-1)[:, 0]

    def decide(self, probability_N: Tensor, num_tiles: Sequence[int]) -> Tensor:
        """Apply the decision rule of the configuration.

        paper: compress where p > 0.5. flash, the released models' rule: where p is above a quantile
        of all tiles of the conversation (strictly, so that a single tile never is) and at least a
        threshold.

        Args:
            probability_N: [N], from `compress_probability`.
            num_tiles: tiles of each conversation, in order, adding up to N.

        Returns:
            [N] bool, True = compressed.
        """
        if self.config.flash_decision_rule == "paper":
            return probability_N > 0.5
        compressed_N = probability_N >= self.config.flash_absolute_threshold
        quantiles = [
            torch.quantile(each, float(self.config.flash_relative_threshold)).expand(len(each))
            for each in probability_N.split(list(num_tiles))
            if len(each)
        ]
        return compressed_N & (probability_N > torch.cat(quantiles))

    def visual_tokens(self, features_NPD: Tensor, compressed_N: Tensor) -> Tensor:
        """Visual tokens of tiles under a plan.

        Args:
            features_NPD: [N, P, D], outputs of the vision tower.
            compressed_N: [N] bool.

        Returns:
            [V, H], in tile order.
        """
        ratio = self.config.shuffle_ratio
        kept_VH = self.mlp1(pixel_shuffle(features_NPD[~compressed_N], ratio))
        if not compressed_N.any():
            return kept_VH.flatten(0, 1)
        compressed_VH = self.mlp2(pixel_shuffle(features_NPD[compressed_N], 2 * ratio))
        kept, compressed = iter(kept_VH), iter(compressed_VH)
        return torch.cat([next(compressed if each else kept) for each in compressed_N.tolist()])

    # Text.

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        compressed: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model on text and visual tokens.

        Args:
            pixel_values: [N, 3, S, S], tiles of all conversations in order; unset, there are none.
            input_ids: [B, S], `num_image_token` image tokens a tile whether or not it will be
                compressed.
            attention_mask: [B, S]; unset, all ones.
            compressed: [N] bool, a plan to use instead of the router's.
            kwargs: for the language model.

        Returns:
            The language model's output. Where tiles were compressed its rows are the shorter
            conversations, padded on the left.

        Raises:
            ValueError: if image tokens and tiles do not match, or a plan is given that cannot be
                used.
        """
        embeds_BSH, attention_mask = self._embed(
            pixel_values, input_ids, attention_mask, compressed
        )
        return self.language_model(
            inputs_embeds=embeds_BSH, attention_mask=attention_mask, **kwargs
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        compressed: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Go on with text; arguments as in `forward`, `kwargs` for the language model's `generate`.

        Returns:
            [B, new tokens] int64, or what kwargs ask for.
        """
        embeds_BSH, attention_mask = self._embed(
            pixel_values, input_ids, attention_mask, compressed
        )
        return self.language_model.generate(
            inputs_embeds=embeds_BSH, attention_mask=attention_mask, **kwargs
        )

    def _embed(
        self,
        pixel_values: Tensor | None,
        input_ids_BS: Tensor | None,
        mask_BS: Tensor | None,
        compressed_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings with visual tokens in place, and their mask; the one place where tokens are
        removed."""
        if input_ids_BS is None:
            raise ValueError("input_ids is missing; expected [B, S] int64.")
        mask_BS = torch.ones_like(input_ids_BS) if mask_BS is None else mask_BS
        embeds_BSH = self.get_input_embeddings()(input_ids_BS)
        image_BS = input_ids_BS == self.img_context_token_id
        num_tiles_B = self._num_tiles(image_BS, 0 if pixel_values is None else len(pixel_values))
        self.compressed_tiles = torch.zeros(
            sum(num_tiles_B), dtype=torch.bool, device=input_ids_BS.device
        )
        if pixel_values is None or not len(pixel_values):
            return embeds_BSH, mask_BS
        features_NPD = self.vision_model(
            pixel_values.to(self.device, self.vision_model.embeddings.class_embedding.dtype)
        )
        self.compressed_tiles = compressed_N = self._plan(features_NPD, num_tiles_B, compressed_N)
        # The first 64 of a compressed tile's 256 image tokens stay.
        keep_NQ = torch.ones(
            len(features_NPD), self.num_image_token, dtype=torch.bool, device=image_BS.device
        )
        keep_NQ[compressed_N, self.config.num_image_token_compressed :] = False
        keep_BS = torch.ones_like(image_BS)
        keep_BS[image_BS] = keep_NQ.flatten()
        embeds_BSH[image_BS & keep_BS] = self.visual_tokens(features_NPD, compressed_N).to(
            embeds_BSH.dtype
        )
        if not compressed_N.any():
            return embeds_BSH, mask_BS
        return _left_padded(embeds_BSH, keep_BS & mask_BS.bool())

    def _num_tiles(self, image_BS: Tensor, num_given: int) -> list[int]:
        counts = image_BS.sum(dim=1).tolist()
        if (
            any(count % self.num_image_token for count in counts)
            or sum(counts) != num_given * self.num_image_token
        ):
            raise ValueError(
                f"found {counts} image tokens (id {self.img_context_token_id}) in the"
                f" conversations and {num_given} tiles; expected {self.num_image_token} image"
                " tokens for each tile."
            )
        return [count // self.num_image_token for count in counts]

    def _plan(self, features_NPD: Tensor, num_tiles_B: list[int], given_N: Tensor | None) -> Tensor:
        if given_N is None:
            if self.config.flash_mode:
                return self.decide(self.compress_probability(features_NPD), num_tiles_B)
            return torch.zeros(len(features_NPD), dtype=torch.bool, device=features_NPD.device)
        given_N = given_N.to(features_NPD.device, torch.bool)
        if given_N.shape != (len(features_NPD),):
            raise ValueError(
                f"compressed has shape {tuple(given_N.shape)}, expected [{len(features_NPD)}]."
            )
        if given_N.any() and self.config.flash_mode is None:
            raise ValueError(
                "compressed asks for 64-token tiles, which a model without flash_mode does not"
                " have."
            )
        return given_N

    # Conversations.

    def chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict[str, Any] | None = None,
        history: Sequence[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
    ) -> Any:
        """Answer a question, or the next one of a conversation.

        Args:
            tokenizer: of the export.
            pixel_values: [N, 3, S, S], all tiles of the conversation, of earlier questions too;
                None: text only.
            question: with an `<image>` for each new image; in a first question without any, images
                come first.
            generation_config: arguments of transformers' `generate`.
            history: earlier (question, answer) pairs.
            return_history: whether to give back the history with this question as well.
            num_patches_list: tiles of each image; unset, all tiles are of one image.

        Returns:
            The answer, or (answer, history).

        Raises:
            ValueError: if `<image>` tags, num_patches_list and tiles do not match.
        """
        counts = _tiles_per_image(pixel_values, num_patches_list)
        if not history and IMAGE_TAG not in question:
            question = f"{IMAGE_TAG}\n" * len(counts) + question
        past = list(history or [])
        prompt = self.prompt([*past, (question, None)], counts)
        (answer,) = self._answer(tokenizer, pixel_values, [prompt], generation_config)
        return (answer, [*past, (question, answer)]) if return_history else answer

    def batch_chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        questions: Sequence[str],
        generation_config: dict[str, Any] | None = None,
        num_patches_list: Sequence[int] | None = None,
    ) -> list[str]:
        """Answer several questions at once, each about one image of its own, or each without any.

        Args:
            tokenizer: of the export.
            pixel_values: [N, 3, S, S], tiles of all images in order; None: text only.
            questions: with an `<image>` or none, in which case the image comes first.
            generation_config: arguments of transformers' `generate`.
            num_patches_list: tiles of each question's image.

        Returns:
            The answers.

        Raises:
            ValueError: if questions and images do not match.
        """
        counts = _tiles_per_image(pixel_values, num_patches_list)
        if counts and len(counts) != len(questions):
            raise ValueError(
                f"{len(questions)} questions but num_patches_list has {len(counts)} images."
            )
        prompts = []
        for number, question in enumerate(questions):
            own = counts[number : number + 1]
            if IMAGE_TAG not in question:
                question = f"{IMAGE_TAG}\n" * len(own) + question
            prompts.append(self.prompt([(question, None)], own))
        return self._answer(tokenizer, pixel_values, prompts, generation_config)

    def prompt(
        self, turns: Sequence[tuple[str, str | None]], num_patches_list: Sequence[int]
    ) -> str:
        """Text of a conversation up to the answer that is to come, by the template of InternVL3.5
        with Qwen3.

        Args:
            turns: (question, answer) pairs; the last answer is None.
            num_patches_list: tiles of each `<image>` of the questions.

        Returns:
            The text, with all image tokens.

        Raises:
            ValueError: if the configuration names another template, or tags and images do not
                match.
        """
        if self.config.template != "internvl2_5":
            raise ValueError(
                f"template is {self.config.template!r}; this model code has 'internvl2_5' only."
            )
        num_tags = sum(question.count(IMAGE_TAG) for question, _ in turns)
        if num_tags != len(num_patches_list):
            raise ValueError(
                f"{num_tags} {IMAGE_TAG} tags but {len(num_patches_list)} images; give one tag an"
                " image."
            )
        counts = iter(num_patches_list)
        text = f"{TURN_START}system\n{self.system_message}{TURN_END}\n"
        for question, answer in turns:
            first, *others = question.split(IMAGE_TAG)
            for piece in others:
                first += (
                    IMAGE_START
                    + IMAGE_CONTEXT * (self.num_image_token * next(counts))
                    + IMAGE_END
                    + piece
                )
            text += f"{TURN_START}user\n{first}{TURN_END}\n{TURN_START}assistant\n"
            if answer is not None:
                text += f"{answer}{TURN_END}\n"
        return text

    def _answer(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        prompts: list[str],
        generation_config: dict[str, Any] | None,
    ) -> list[str]:
        self.img_context_token_id = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
        rows = [tokenizer(text, add_special_tokens=False).input_ids for text in prompts]
        longest = max(len(ids) for ids in rows)
        end = tokenizer.convert_tokens_to_ids(TURN_END)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        settings = {"eos_token_id": end, "pad_token_id": pad} | (generation_config or {})
        said_BS = self.generate(
            pixel_values,
            torch.tensor([[pad] * (longest - len(ids)) + ids for ids in rows], device=self.device),
            torch.tensor(
                [[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=self.device
            ),
            **settings,
        )
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said_BS.tolist()]


def pixel_shuffle(features_NPD: Tensor, ratio: int) -> Tensor:
    """Fold each ratio x ratio square of patches into one vector (the released models' pixel shuffle
    "v2").

    Args:
        features_NPD: [N, P, D], patches row by row; P is a square number.
        ratio: side of a square, in patches.

    Returns:
        [N, P / ratio^2, ratio^2 * D], squares row by row, channels of a square patch by patch, row
        by row.
    """
    num_tiles, num_patches, width = features_NPD.shape
    side = math.isqrt(num_patches)
    squares = features_NPD.reshape(num_tiles, side // ratio, ratio, side // ratio, ratio, width)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(
        num_tiles, num_patches // ratio**2, ratio**2 * width
    )


def _tiles_per_image(
    pixel_values: Tensor | None, num_patches_list: Sequence[int] | None
) -> list[int]:
    num_tiles = 0 if pixel_values is None else len(pixel_values)
    counts = (
        ([num_tiles] if num_tiles else []) if num_patches_list is None else list(num_patches_list)
    )
    if sum(counts) != num_tiles:
        raise ValueError(
            f"num_patches_list {counts} adds up to {sum(counts)} tiles, but pixel_values has"
            f" {num_tiles}."
        )
    return counts


def _left_padded(embeds_BSH: Tensor, keep_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The kept positions of each row, without gaps and aligned on the right, and their mask."""
    rows = [row_SH[keep_S] for row_SH, keep_S in zip(embeds_BSH, keep_BS, strict=True)]
    longest = max(len(row) for row in rows)
    padded_BSH = embeds_BSH.new_zeros(len(rows), longest, embeds_BSH.size(-1))
    mask_BS = torch.zeros(len(rows), longest, dtype=torch.int64, device=embeds_BSH.device)
    for number, row in enumerate(rows):
        padded_BSH[number, longest - len(row) :] = row
        mask_BS[number, longest - len(row) :] = 1
    return padded_BSH, mask_BS
