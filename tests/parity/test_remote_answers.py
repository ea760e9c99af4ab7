"""The model code of exports answers as the engine does, and reads images as training does."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig

from megatron_vico.config.registry import get_model_config
from megatron_vico.convert.huggingface import safetensors_folder
from megatron_vico.data.encode import tiling
from tests.parity.remote_exports import (
    IMAGES,
    MAX_NEW_TOKENS,
    ROUTINGS,
    Exported,
    conversation,
    generation,
    load,
    load_tokenizer_of,
    one_kind,
    uncompressed_ids,
    with_later_image,
)
from tests.toy_data import noise_png
from tests.toy_models import make_encoder, random_tiles

pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.mark.parametrize("rule", ROUTINGS)
def test_generated_tokens_are_the_engines(exported: Exported, rule: str) -> None:
    remote = load(exported.flash, flash_decision_rule=rule)
    prompts = [exported.engine.prompt(conversation(index)) for index in range(len(IMAGES))]
    answers = list(
        exported.engine.answer(prompts, plan=ROUTINGS[rule], max_new_tokens=MAX_NEW_TOKENS)
    )
    lens = []
    for prompt, expected in zip(prompts, answers, strict=True):
        pixels = exported.engine.encoder.normalise(torch.from_numpy(prompt.parts[0].tiles))
        ids = uncompressed_ids(exported, prompt)
        for turn, text in enumerate(expected.texts):
            if turn:
                ids += [exported.tokenizer.eos_id, *prompt.parts[turn].token_ids.tolist()]
            (said,) = remote.generate(pixels, torch.tensor([ids]), **generation(exported)).tolist()
            if said[-1] == exported.tokenizer.eos_id:
                said.pop()
            assert exported.tokenizer.decode(said) == text
            assert torch.equal(remote.compressed_tiles, expected.compressed_N)
            ids += said
            lens.append(len(said))
    # Some answers end on their own, and together they say something.
    assert min(lens) < MAX_NEW_TOKENS < sum(lens)
    # What is said depends on the plan, and the plan on the tile.
    kept = exported.engine.answer(prompts, plan="none", max_new_tokens=MAX_NEW_TOKENS)
    assert [answer.texts for answer in kept] != [answer.texts for answer in answers]
    everything = torch.cat([answer.compressed_N for answer in answers])
    assert 0 < int(everything.sum()) < len(everything)


@one_kind
def test_an_image_may_come_with_a_later_question(exported: Exported) -> None:
    """Several conversations in a batch, one after the other in transformers."""
    remote = load(exported.flash, flash_decision_rule="paper")
    samples = [with_later_image(conversation(index)) for index in range(len(IMAGES))]
    prompts = [exported.engine.prompt(sample) for sample in samples]
    answers = exported.engine.answer(prompts, plan=ROUTINGS["paper"], max_new_tokens=MAX_NEW_TOKENS)
    for prompt, expected in zip(prompts, answers, strict=True):
        tiles = torch.cat([torch.from_numpy(part.tiles) for part in prompt.parts])
        said = expected.token_ids[0]
        ids = [*uncompressed_ids(exported, prompt), *said, exported.tokenizer.eos_id]
        ids += uncompressed_ids(exported, prompt, part=1)
        pixels = exported.engine.encoder.normalise(tiles)
        (found,) = remote.generate(pixels, torch.tensor([ids]), **generation(exported)).tolist()
        assert (
            tuple(each for each in found if each != exported.tokenizer.eos_id)
            == (expected.token_ids[1])
        )
        assert torch.equal(remote.compressed_tiles, expected.compressed_N)


@one_kind
def test_switched_off_nothing_is_compressed_and_nothing_is_lost(
    exported: Exported, tmp_path: Path
) -> None:
    remote = load(exported.flash, flash_mode=False)
    prompts = [
        exported.engine.prompt(conversation(index, num_questions=1)) for index in range(len(IMAGES))
    ]
    answers = exported.engine.answer(prompts, plan="none", max_new_tokens=MAX_NEW_TOKENS)
    for prompt, expected in zip(prompts, answers, strict=True):
        pixels = exported.engine.encoder.normalise(torch.from_numpy(prompt.parts[0].tiles))
        ids = torch.tensor([uncompressed_ids(exported, prompt)])
        (said,) = remote.generate(pixels, ids, **generation(exported)).tolist()
        if said[-1] == exported.tokenizer.eos_id:
            said.pop()
        assert exported.tokenizer.decode(said) == expected.texts[0]
        assert not remote.compressed_tiles.any()
    remote.save_pretrained(tmp_path / "saved")
    saved = safetensors_folder.open_folder(tmp_path / "saved")
    original = safetensors_folder.open_folder(exported.flash)
    assert saved.tensors.keys() == original.tensors.keys()


@one_kind
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
    found = (read.flash_decision_rule, read.vir_num_heads, read.img_context_token_id)
    assert found == ("flash", 16, 151671)


@one_kind
def test_chat_tiles_asks_and_remembers(exported: Exported, tmp_path: Path) -> None:
    remote, tokenizer = load(exported.flash), load_tokenizer_of(exported.flash)
    said, generate = [], remote.generate

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        said.append(generate(*args, **kwargs))
        return said[-1]

    remote.generate = recorded
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
        pixels, counts = remote.load_images(files) if files else (None, [])
        assert counts == prompt.tiles_per_image
        answer, history = remote.chat(
            tokenizer, pixels, "What is it?", settings, return_history=True, num_patches_list=counts
        )
        assert history == [("<image>\n" * len(files) + "What is it?", answer)]
        text = remote.prompt([(history[0][0], None)], counts)
        assert tokenizer(text, add_special_tokens=False).input_ids == uncompressed_ids(
            exported, prompt
        )
        ids = [token for token in said[-1][0].tolist() if token != exported.tokenizer.eos_id]
        assert exported.tokenizer.decode(ids) == expected.texts[0]
        assert answer == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert torch.equal(remote.compressed_tiles, expected.compressed_N)
        remote.chat(
            tokenizer, pixels, "And now?", settings, history=history, num_patches_list=counts
        )
        assert torch.equal(remote.compressed_tiles, expected.compressed_N)


@one_kind
def test_a_batch_gives_each_conversation_its_own_answer(exported: Exported) -> None:
    remote, tokenizer = load(exported.flash), load_tokenizer_of(exported.flash)
    images = [
        Image.open(io.BytesIO(noise_png(*size, seed=7 + number)))
        for number, size in enumerate([(64, 64), (32, 64)])
    ]
    tiles = [remote.load_image(image) for image in images]
    questions = ["What is it? And now?", "Yes?"]
    together = remote.batch_chat(
        tokenizer, torch.cat(tiles), questions, generation(exported), [len(each) for each in tiles]
    )
    plans = remote.compressed_tiles.split([len(each) for each in tiles])
    for each, question, answer, plan in zip(tiles, questions, together, plans, strict=True):
        assert remote.chat(tokenizer, each, question, generation(exported)) == answer
        assert torch.equal(remote.compressed_tiles, plan)
    assert remote.batch_chat(tokenizer, None, ["Yes?"], generation(exported)) == [
        remote.chat(tokenizer, None, "Yes?", generation(exported))
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
        image = Image.open(io.BytesIO(noise_png(*size, seed=0)))
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
    Image.open(io.BytesIO(noise_png(70, 40, seed=0))).convert("RGBA").convert(mode).save(
        path, exif=exif
    )
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


@one_kind
def test_errors_say_what_is_wrong(exported: Exported) -> None:
    remote, tokenizer = load(exported.flash), load_tokenizer_of(exported.flash)
    pixels = exported.engine.encoder.normalise(random_tiles(exported.model, 2))
    for pixel_values, num_tokens in ((pixels, 7), (pixels, 4), (None, 4)):
        with pytest.raises(ValueError, match="expected 4 image tokens for each tile"):
            remote.generate(pixel_values, torch.tensor([[7] + [5] * num_tokens]))
    with pytest.raises(ValueError, match="shape"):
        remote.generate(pixels[..., :16], torch.tensor([[5] * 8]))
    with pytest.raises(ValueError, match="3 <image> tags but 1 images"):
        remote.chat(tokenizer, pixels, "<image><image><image>")
    with pytest.raises(ValueError, match="adds up to 3"):
        remote.chat(tokenizer, pixels, "What?", num_patches_list=[1, 2])
    plain = load(exported.internvl)
    with pytest.raises(ValueError, match="flash_mode"):
        plain.generate(pixels, torch.tensor([[5] * 8]), compressed=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="tensors were not found, gating"):
        load(exported.internvl, flash_mode=True, flash_decision_rule="paper", vir_num_heads=4)
    config = type(remote.config)
    for field, value, message in (
        ("flash_decision_rule", "image", "expected 'paper' or 'flash'"),
        ("flash_relative_threshold", None, "set both"),
        ("select_layer", -2, "select_layer is -2"),
        ("ps_version", "v1", "ps_version is 'v1'"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**(remote.config.to_dict() | {field: value}))
