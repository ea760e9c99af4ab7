"""Exports with their model code, and how transformers loads and asks them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from megatron_vico.config.registry import ModelConfig
from megatron_vico.convert.huggingface.config import ExportOptions
from megatron_vico.convert.modules import canonical_state
from megatron_vico.data.encode.expand import expand
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.inference.engine import Engine
from megatron_vico.inference.plans import Prompt, Routing
from tests.hf_exports import export_hf
from tests.toy_data import noise_png
from tests.toy_models import KINDS, combine, make_encoder, make_language_model

OPTIONS = ExportOptions(
    flash_relative_threshold=0.6, flash_absolute_threshold=0.4, max_dynamic_patch=4
)
ROUTINGS = {
    "paper": Routing(rule="paper"),
    "flash": Routing(rule="flash", relative_threshold=0.6, absolute_threshold=0.4),
}
MAX_NEW_TOKENS = 10
# Images of each conversation, (width, height) in px: 5 tiles, none, 1, 4 and 3 (two images share
# the budget), 2 and 1.
IMAGES = [((64, 64),), (), ((32, 32),), ((96, 32), (70, 33)), ((32, 64), (20, 20))]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Our model, and the folders it was written to."""

    engine: Engine
    model: ModelConfig
    tokenizer: Tokenizer
    flash: Path
    internvl: Path

    def canonical_state(self) -> dict[str, Tensor]:
        return canonical_state(
            {"encoder": self.engine.encoder, "language_model": self.engine.language_model}
        )


@pytest.fixture(scope="module", params=KINDS, ids=" and ".join)
def exported(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    single_process_groups: None,
) -> Exported:
    model = combine(*request.param)
    folder = tmp_path_factory.mktemp("exports")
    text = ["What is it? And now? Yes, no, two tiles. user assistant system"] * 50
    tokenizer = load_tokenizer(
        train_sentencepiece(text, model_prefix=folder / "toy", vocab_size=320)
    )
    encoder, language_model = make_encoder(model), make_language_model(model)
    settings = EncodingSettings(image_size=32, max_dynamic_patch=4)
    engine = Engine(
        encoder=encoder,
        language_model=language_model,
        tokenizer=tokenizer,
        model=model,
        settings=settings,
    )
    with torch.no_grad():
        language_model.gpt.output_layer.weight[tokenizer.eos_id].mul_(
            2.0
        )  # so that some answers end on their own
    _centre_router(engine)
    for layout in ("flash", "internvl"):
        export_hf(
            folder / layout,
            encoder=encoder,
            language_model=language_model,
            model=model,
            layout=layout,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            options=OPTIONS,
        )
    return Exported(
        engine=engine,
        model=model,
        tokenizer=tokenizer,
        flash=folder / "flash",
        internvl=folder / "internvl",
    )


@torch.no_grad()
def _centre_router(engine: Engine) -> None:
    """Make half of the tests' tiles ones to compress, with log-odds of standard deviation 2."""
    prompts = [engine.prompt(conversation(index)) for index in range(len(IMAGES))]
    probability = torch.cat([each for _, each in engine.route(prompts, ROUTINGS["paper"])])
    gate, scale = engine.encoder.vir.gating.gate[1], 2 / probability.logit().std()
    gate.weight.mul_(scale)
    gate.bias.mul_(scale)
    gate.bias[0] -= scale * probability.logit().quantile(0.5)  # between two of an even number


one_kind = pytest.mark.parametrize("exported", KINDS[:1], indirect=True, ids=" and ".join)
"""Of what no module has a part in: weights, logits and answers are compared for all kinds."""


def load(folder: Path, **kwargs: Any) -> Any:
    model, loading = AutoModel.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, local_files_only=True, **kwargs
    )
    assert not any(loading.values()), loading
    return model


def load_tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


def conversation(index: int, *, num_questions: int = 2) -> ConversationSample:
    images = tuple(
        noise_png(*size, seed=10 * index + number) for number, size in enumerate(IMAGES[index])
    )
    turns = [Turn("human", "<image>\n" * len(images) + "What is it?")]
    for _ in range(num_questions - 1):
        turns += [Turn("gpt", "two"), Turn("human", "And now?")]
    return ConversationSample(key=f"c{index}", turns=tuple(turns), images=images)


def with_later_image(sample: ConversationSample) -> ConversationSample:
    *turns, last = sample.turns
    image = noise_png(64, 32, seed=99)
    later = Turn("human", f"{last.text} <image>")
    return replace(sample, turns=(*turns, later), images=(*sample.images, image))


def uncompressed_ids(exported: Exported, prompt: Prompt, *, part: int = 0) -> list[int]:
    """What a user of the remote code writes: every tile with all its image tokens."""
    kept = torch.zeros(prompt.parts[part].num_tiles, dtype=torch.bool)
    stream = expand(
        [prompt.parts[part]], plan=kept, tokens_kept=4, tokens_compressed=1, image_token_id=5
    )
    return stream.token_ids.tolist()


def generation(exported: Exported) -> dict[str, Any]:
    # Ids without a token in the tokenizer, which the engine never says either.
    unused = list(range(exported.tokenizer.vocab_size, exported.model.language.vocab_size))
    return {
        "max_new_tokens": MAX_NEW_TOKENS,
        "do_sample": False,
        "suppress_tokens": unused,
        "eos_token_id": exported.tokenizer.eos_id,
        "pad_token_id": exported.tokenizer.pad_id,
    }
