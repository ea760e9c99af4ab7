"""The model code that exports carry, run by transformers alone, against our own model and
engine."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from megatron_vico import files
from megatron_vico.config.config_json import differences
from megatron_vico.config.registry import ModelConfig, get_model_config
from megatron_vico.convert import convert
from megatron_vico.convert.huggingface import safetensors_folder
from megatron_vico.convert.huggingface.config import ExportOptions, model_json
from megatron_vico.convert.modules import canonical_state
from megatron_vico.convert.open import open_source
from megatron_vico.convert.remote_code_files import write_remote_code
from megatron_vico.data.encode import tiling
from megatron_vico.data.encode.expand import expand
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.inference.engine import Engine, Prompt, Routing
from megatron_vico.models.language_model import LanguageInputs
from tests.toy_models import KINDS, combine, make_encoder, make_language_model, random_tiles

pytestmark = pytest.mark.usefixtures("modules_cache")

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
        convert.export_hf(
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


def load(folder: Path, **kwargs: Any) -> Any:
    model, loading = AutoModel.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, local_files_only=True, **kwargs
    )
    assert not any(loading.values()), loading
    return model


def load_tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


def png(width: int, height: int, seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def conversation(index: int, *, num_questions: int = 2) -> ConversationSample:
    images = tuple(
        png(*size, seed=10 * index + number) for number, size in enumerate(IMAGES[index])
    )
    turns = [Turn("human", "<image>\n" * len(images) + "What is it?")]
    for _ in range(num_questions - 1):
        turns += [Turn("gpt", "two"), Turn("human", "And now?")]
    return ConversationSample(key=f"c{index}", turns=tuple(turns), images=images)


def uncompressed_ids(exported: Exported, prompt: Prompt) -> list[int]:
    """What a user of the remote code writes: every tile with all its image tokens."""
    kept = torch.zeros(prompt.first.num_tiles, dtype=torch.bool)
    stream = expand([prompt.first], plan=kept, tokens_kept=4, tokens_compressed=1, image_token_id=5)
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


@pytest.mark.parametrize("layout", ["flash", "internvl"])
def test_every_tensor_goes_in_and_out_bit_for_bit(
    exported: Exported, layout: str, tmp_path: Path
) -> None:
    source: Path = getattr(exported, layout)
    model = load(source)
    assert not model.training
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "saved")
    saved, original = (
        safetensors_folder.open_folder(tmp_path / "saved"),
        safetensors_folder.open_folder(source),
    )
    assert saved.tensors.keys() == original.tensors.keys()
    assert any("attn3" in name for name in saved.tensors) == (layout == "flash")
    imported = open_source(tmp_path / "saved")
    assert imported.layout == layout
    router = {"vir_num_heads": imported.model.vir_num_heads} if layout == "internvl" else {}
    assert differences(imported.model, replace(exported.model, **router)) == []
    expected = exported.canonical_state()
    for name, info in imported.tensors.items():  # without the rows that pad the vocabulary
        assert torch.equal(imported.read_tensor(name), expected[name][: info.shape[0]]), name
    # What transformers saved carries the code along and loads again.
    load(tmp_path / "saved")


def test_bfloat16_and_the_other_auto_classes(exported: Exported) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        exported.flash, trust_remote_code=True, local_files_only=True, dtype=torch.bfloat16
    )
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    config = AutoConfig.from_pretrained(
        exported.flash, trust_remote_code=True, local_files_only=True
    )
    assert type(config).__name__ == "InternVLChatConfig"
    assert (config.num_image_token, config.num_image_token_compressed) == (4, 1)
    fresh = AutoModel.from_config(config, trust_remote_code=True)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert all(param.isfinite().all() for param in fresh.parameters())


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("internvl3_5-1b", 1_151_171_586),
        ("internvl3_5-2b", 2_491_055_106),
        ("internvl3_5-4b", 4_906_132_482),
        ("internvl3_5-8b", 8_813_642_754),
        ("internvl3_5-14b", 15_495_030_786),
        ("internvl3_5-38b", 39_563_810_306),
        ("internvl3_5-30b-a3b", 30_991_437_826),
        ("internvl3_5-241b-a28b", 241_711_289_346),
    ],
)
def test_real_sizes_have_the_parameters_of_the_releases(
    name: str, num_params: int, tmp_path: Path
) -> None:
    write_remote_code(tmp_path)
    contents = model_json(
        get_model_config(name), layout="flash", dtype="bfloat16", options=ExportOptions()
    )
    files.write_json(tmp_path / "config.json", contents)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True, local_files_only=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    assert sum(param.numel() for param in model.parameters()) == num_params
    assert (config.num_image_token, config.num_image_token_compressed) == (256, 64)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["flash", "internvl"])
def test_logits_equal_our_own_models(exported: Exported, layout: str) -> None:
    theirs = load(getattr(exported, layout))
    encoder, language_model, model = (
        exported.engine.encoder,
        exported.engine.language_model,
        exported.model,
    )
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> Tensor:
        return torch.randint(6, 512, (length,), generator=generator)

    documents = [
        ([text(4), text(0), text(9)], 2),
        ([text(6)], 0),
        ([text(2), text(3), text(0), text(20)], 3),
    ]
    plan = torch.tensor([False, True, True, True, False]) & (layout == "flash")
    pixels = encoder.normalise(random_tiles(model, 5))
    ours, expected, first = [], [], 0
    for pieces, num_tiles in documents:
        tiles, own = pixels[first : first + num_tiles], plan[first : first + num_tiles]
        first += num_tiles
        short = [torch.full((1 if each else 4,), 5) for each in own]
        long = [torch.full((4,), 5)] * num_tiles
        ours.append(_alternate(pieces, short))
        output = theirs(
            tiles if num_tiles else None, _alternate(pieces, long)[None], compressed=own
        )
        assert torch.equal(theirs.compressed_tiles, own)
        expected.append(output.logits[0])
    token_ids = torch.cat(ours)
    inputs = LanguageInputs(
        token_ids_T=token_ids,
        visual_positions_V=(token_ids == 5).nonzero()[:, 0],
        cu_seqlens=torch.tensor([0, *(len(each) for each in ours)]).cumsum(0).int(),
        document_lens=tuple(len(each) for each in ours),
        response_rows_R=torch.arange(len(token_ids)),
        shard_len=len(token_ids),
    )
    logits = language_model.response_logits(
        language_model(inputs, encoder.visual_tokens(encoder.features(pixels), plan))
    )
    assert logits.std() > 0.5  # a comparison of noughts would say nothing
    # Measured: at most 5.3e-6 over all kinds and both layouts, of logits whose standard deviation
    # is 1.
    torch.testing.assert_close(
        torch.cat(expected), logits, rtol=0, atol=1e-4
    )  # measured: at most 6e-6


def _alternate(pieces: list[Tensor], tiles: list[Tensor]) -> Tensor:
    """Text and tiles in turn, beginning and ending with text."""
    parts = [pieces[0]]
    for tile, piece in zip(tiles, pieces[1:], strict=True):
        parts += [tile, piece]
    return torch.cat(parts)


@pytest.mark.parametrize("rule", ROUTINGS)
def test_generated_tokens_are_the_engines(exported: Exported, rule: str) -> None:
    theirs = load(exported.flash, flash_decision_rule=rule)
    prompts = [exported.engine.prompt(conversation(index)) for index in range(len(IMAGES))]
    answers = list(
        exported.engine.answer(prompts, plan=ROUTINGS[rule], max_new_tokens=MAX_NEW_TOKENS)
    )
    lens = []
    for prompt, expected in zip(prompts, answers, strict=True):
        pixels = exported.engine.encoder.normalise(torch.from_numpy(prompt.first.tiles))
        ids = uncompressed_ids(exported, prompt)
        for turn, text in enumerate(expected.texts):
            if turn:
                ids += [exported.tokenizer.eos_id, *prompt.follow_ups[turn - 1].tolist()]
            (said,) = theirs.generate(pixels, torch.tensor([ids]), **generation(exported)).tolist()
            if said[-1] == exported.tokenizer.eos_id:
                said.pop()
            assert exported.tokenizer.decode(said) == text
            assert torch.equal(theirs.compressed_tiles, expected.compressed_N)
            ids += said
            lens.append(len(said))
    # Some answers end on their own, and together they say something.
    assert min(lens) < MAX_NEW_TOKENS < sum(lens)
    # What is said depends on the plan, and the plan on the tile.
    kept = exported.engine.answer(prompts, plan="none", max_new_tokens=MAX_NEW_TOKENS)
    assert [answer.texts for answer in kept] != [answer.texts for answer in answers]
    everything = torch.cat([answer.compressed_N for answer in answers])
    assert 0 < int(everything.sum()) < len(everything)


def test_switched_off_nothing_is_compressed_and_nothing_is_lost(
    exported: Exported, tmp_path: Path
) -> None:
    theirs = load(exported.flash, flash_mode=False)
    prompts = [
        exported.engine.prompt(conversation(index, num_questions=1)) for index in range(len(IMAGES))
    ]
    answers = exported.engine.answer(prompts, plan="none", max_new_tokens=MAX_NEW_TOKENS)
    for prompt, expected in zip(prompts, answers, strict=True):
        pixels = exported.engine.encoder.normalise(torch.from_numpy(prompt.first.tiles))
        ids = torch.tensor([uncompressed_ids(exported, prompt)])
        (said,) = theirs.generate(pixels, ids, **generation(exported)).tolist()
        if said[-1] == exported.tokenizer.eos_id:
            said.pop()
        assert exported.tokenizer.decode(said) == expected.texts[0]
        assert not theirs.compressed_tiles.any()
    theirs.save_pretrained(tmp_path / "saved")
    saved, original = (
        safetensors_folder.open_folder(tmp_path / "saved"),
        safetensors_folder.open_folder(exported.flash),
    )
    assert saved.tensors.keys() == original.tensors.keys()


def test_the_rules_differ_and_flash_is_the_default(exported: Exported, tmp_path: Path) -> None:
    prompts = [exported.engine.prompt(conversation(index)) for index in range(len(IMAGES))]
    plans = {}
    for rule, routing in ROUTINGS.items():
        plans[rule] = torch.cat([plan for plan, _ in exported.engine.route(prompts, routing)])
    assert not torch.equal(plans["paper"], plans["flash"])
    # A released config.json has no field for the rule, nor for the heads of 16 or the id of the
    # image token.
    config = AutoConfig.from_pretrained(
        exported.flash, trust_remote_code=True, local_files_only=True
    )
    released = config.to_dict()
    for name in ("flash_decision_rule", "vir_num_heads", "img_context_token_id"):
        del released[name]
    read = type(config).from_dict(released)
    assert (read.flash_decision_rule, read.vir_num_heads, read.img_context_token_id) == (
        "flash",
        16,
        151671,
    )


def test_chat_tiles_asks_and_remembers(exported: Exported, tmp_path: Path) -> None:
    theirs, tokenizer = load(exported.flash), load_tokenizer_of(exported.flash)
    said, generate = [], theirs.generate

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        said.append(generate(*args, **kwargs))
        return said[-1]

    theirs.generate = recorded
    settings = generation(exported)
    for index in range(len(IMAGES)):
        sample = conversation(index)
        prompt = exported.engine.prompt(sample)
        (expected,) = exported.engine.answer(
            [prompt], plan=ROUTINGS["flash"], max_new_tokens=MAX_NEW_TOKENS
        )
        files = [tmp_path / f"{index}-{number}.png" for number in range(len(sample.images))]
        for file, content in zip(files, sample.images, strict=True):
            file.write_bytes(content)
        pixels, counts = theirs.load_images(files) if files else (None, [])
        assert counts == list(prompt.first.tiles_per_image)
        answer, history = theirs.chat(
            tokenizer, pixels, "What is it?", settings, return_history=True, num_patches_list=counts
        )
        assert history == [("<image>\n" * len(files) + "What is it?", answer)]
        text = theirs.prompt([(history[0][0], None)], counts)
        assert tokenizer(text, add_special_tokens=False).input_ids == uncompressed_ids(
            exported, prompt
        )
        ids = [token for token in said[-1][0].tolist() if token != exported.tokenizer.eos_id]
        assert exported.tokenizer.decode(ids) == expected.texts[0]
        assert answer == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert torch.equal(theirs.compressed_tiles, expected.compressed_N)
        theirs.chat(
            tokenizer, pixels, "And now?", settings, history=history, num_patches_list=counts
        )
        assert torch.equal(theirs.compressed_tiles, expected.compressed_N)


def test_a_batch_gives_each_conversation_its_own_answer(exported: Exported) -> None:
    theirs, tokenizer = load(exported.flash), load_tokenizer_of(exported.flash)
    images = [
        Image.open(io.BytesIO(png(*size, seed=7 + number)))
        for number, size in enumerate([(64, 64), (32, 64)])
    ]
    tiles = [theirs.load_image(image) for image in images]
    questions = ["What is it? And now?", "Yes?"]
    together = theirs.batch_chat(
        tokenizer, torch.cat(tiles), questions, generation(exported), [len(each) for each in tiles]
    )
    plans = theirs.compressed_tiles.split([len(each) for each in tiles])
    for each, question, answer, plan in zip(tiles, questions, together, plans, strict=True):
        assert theirs.chat(tokenizer, each, question, generation(exported)) == answer
        assert torch.equal(theirs.compressed_tiles, plan)
    assert theirs.batch_chat(tokenizer, None, ["Yes?"], generation(exported)) == [
        theirs.chat(tokenizer, None, "Yes?", generation(exported))
    ]


@pytest.mark.parametrize(
    "size", [(1, 1), (33, 31), (100, 37), (37, 100), (64, 64), (500, 20), (448, 449)]
)
def test_tiles_have_the_pixels_of_training(
    size: tuple[int, int], single_process_groups: None
) -> None:
    from megatron_vico.convert.remote_code.image_tiles import load_image

    encoder = make_encoder(get_model_config("toy"))
    for max_num, use_thumbnail in ((12, True), (6, False), (1, True)):
        image = Image.open(io.BytesIO(png(*size, seed=0)))
        expected = tiling.tile(
            image, image_size=32, max_dynamic_patch=max_num, use_thumbnail=use_thumbnail
        )
        found = load_image(image, image_size=32, max_num=max_num, use_thumbnail=use_thumbnail)
        assert torch.equal(found, encoder.normalise(torch.from_numpy(expected)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK"])
def test_files_are_read_as_in_training(mode: str, tmp_path: Path) -> None:
    from megatron_vico.convert.remote_code.image_tiles import load_image

    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    exif = Image.Exif()
    exif[0x0112] = (
        6  # turned by 90 degrees: ignored, except that Pillow turns TIFF files read from memory
    )
    Image.open(io.BytesIO(png(70, 40, seed=0))).convert("RGBA").convert(mode).save(path, exif=exif)
    assert Image.open(path).getexif()[0x0112] == 6
    decoded = tiling.decode_image(path.read_bytes(), key="c", number=0)
    for source in (path, str(path), Image.open(io.BytesIO(path.read_bytes()))):
        found = load_image(source, image_size=32, max_num=6)
        assert torch.equal(found, load_image(decoded, image_size=32, max_num=6))
    assert decoded.size == ((40, 70) if mode == "CMYK" else (70, 40))
    assert len(found) > 1


def test_the_grid_is_that_of_training() -> None:
    from megatron_vico.convert.remote_code.image_tiles import choose_grid

    for width in range(1, 2000, 97):
        for height in (*range(1, 2000, 89), 2 * width, width):
            expected = tiling.choose_grid(width, height, image_size=448, max_dynamic_patch=12)
            assert choose_grid(width, height, image_size=448, min_num=1, max_num=12) == expected


def test_errors_say_what_is_wrong(exported: Exported) -> None:
    theirs, tokenizer = load(exported.flash), load_tokenizer_of(exported.flash)
    pixels = exported.engine.encoder.normalise(random_tiles(exported.model, 2))
    for pixel_values, num_tokens in ((pixels, 7), (pixels, 4), (None, 4)):
        with pytest.raises(ValueError, match="expected 4 image tokens for each tile"):
            theirs.generate(pixel_values, torch.tensor([[7] + [5] * num_tokens]))
    with pytest.raises(ValueError, match="shape"):
        theirs.generate(pixels[..., :16], torch.tensor([[5] * 8]))
    with pytest.raises(ValueError, match="3 <image> tags but 1 images"):
        theirs.chat(tokenizer, pixels, "<image><image><image>")
    with pytest.raises(ValueError, match="adds up to 3"):
        theirs.chat(tokenizer, pixels, "What?", num_patches_list=[1, 2])
    plain = load(exported.internvl)
    with pytest.raises(ValueError, match="flash_mode"):
        plain.generate(pixels, torch.tensor([[5] * 8]), compressed=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="tensors were not found, gating"):
        load(exported.internvl, flash_mode=True, flash_decision_rule="paper", vir_num_heads=4)
    config = type(theirs.config)
    for field, value, message in (
        ("flash_decision_rule", "image", "expected 'paper' or 'flash'"),
        ("flash_relative_threshold", None, "set both"),
        ("select_layer", -2, "select_layer is -2"),
        ("ps_version", "v1", "ps_version is 'v1'"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**(theirs.config.to_dict() | {field: value}))
