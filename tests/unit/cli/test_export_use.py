"""What a run's exports say of their use, and that `generate` and `evaluate` follow it."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from megatron_vico.checkpoint.run_folder import read_metadata
from megatron_vico.cli.main import main
from megatron_vico.config.registry import IMAGENET_MEAN
from megatron_vico.data.encode.conversation import encode_prompt
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece
from megatron_vico.data.samples import Turn
from megatron_vico.files import read_json, write_json
from megatron_vico.shard_tools.writer import make_shards
from megatron_vico.training.trainer import train
from tests.toy_data import write_conversations
from tests.training_runs import ToyData, toy_config

TILING = {"max_dynamic_patch": 3, "use_thumbnail": False, "tile_tags": "numbered"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, single_process_groups: None) -> Path:
    """A step of pretraining with a tiling that is nobody's default; its tokenizer file is gone."""
    folder = tmp_path_factory.mktemp("tiled")
    jsonl = write_conversations(folder / "raw", num_samples=8)
    tokenizer = train_sentencepiece(
        [jsonl.read_text()] * 3, model_prefix=folder / "tokenizer", vocab_size=400
    )
    make_shards(
        jsonl,
        image_root=jsonl.parent,
        out_dir=folder / "shards",
        tokenizer=load_tokenizer(tokenizer),
        settings=EncodingSettings(image_size=32, **TILING),
    )
    data = ToyData(tokenizer=tokenizer, shards=folder / "shards")
    save = str(folder / "run")
    train(toy_config(data, "pretrain", train_iters=1, save=save, **TILING))
    tokenizer.rename(folder / "gone.model")
    return folder / "run"


def export(run: Path, layout: str, *words: str) -> Path:
    """Made once."""
    output = run.parent / "-".join([layout, *words])
    if not output.exists():
        files = ["--input", str(run), "--output", str(output)]
        form = ["--from", "megatron", "--to", "hf", "--layout", layout]
        assert main(["convert", *form, *files, *words]) == 0
    return output


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """ask(folder, flags): what is printed about a picture of 3 x 1 tiles."""
    Image.new("RGB", (96, 32), "red").save(tmp_path / "image.png")

    def generate(folder: Path, words: str = "", *, status: int = 0) -> tuple[str, str]:
        flags = f"--load {folder} --image {tmp_path / 'image.png'} --prompt what? {words}"
        assert main(["generate", *flags.split(), "--max-new-tokens", "2"]) == status
        told = capsys.readouterr()
        return told.out, told.err

    return generate


@pytest.mark.parametrize("form", ["run", "internvl", "hf", "flash"])
def test_tiles_are_those_of_training_and_a_flag_that_differs_is_told(form: str, run, ask) -> None:
    folder = run if form == "run" else export(run, form)
    out, err = ask(folder)
    assert "0 of 3 tiles compressed" in out
    assert "no trained connector_16x and no trained vir: nothing is compressed" in err
    assert "note: --" not in err
    out, err = ask(folder, "--max-dynamic-patch 2")
    assert "0 of 2 tiles" in out
    assert f"note: --max-dynamic-patch 2, not 3 as {folder} says" in err


@pytest.mark.parametrize("form", ["run", "internvl", "hf", "flash"])
@pytest.mark.parametrize("plan", ["vir", "all"])
def test_a_plan_that_needs_an_untrained_module_is_refused(form, plan, run, ask) -> None:
    folder = run if form == "run" else export(run, form)
    assert "no trained connector_16x" in ask(folder, f"--plan {plan}", status=2)[1]


def test_the_export_says_it_all(run: Path) -> None:
    config = read_json(export(run, "flash") / "config.json")
    assert TILING.items() <= config.items()
    assert config["flash_mode"] is False
    assert config["untrained_modules"] == ["connector_16x", "vir"]
    assert (config["llm_config"]["eos_token_id"], config["llm_config"]["pad_token_id"]) == (3, 0)
    assert read_metadata(run).trained == ("vit", "connector_4x", "language_model")


def test_what_was_never_trained_is_remembered_on_the_way_back(run: Path, ask) -> None:
    """Also where the layout lacks it, and the conversion draws it."""
    for layout in ("flash", "internvl"):
        back = run.parent / f"back-{layout}"
        words = ["--from", "hf", "--to", "megatron", "--input", str(export(run, layout))]
        assert main(["convert", *words, "--output", str(back)]) == 0
        assert read_metadata(back).trained == ("vit", "connector_4x", "language_model")
        out, err = ask(back)
        assert "0 of 3 tiles" in out
        assert "no trained connector_16x and no trained vir" in err


def test_thresholds_and_rule_are_those_of_the_config(run: Path, tmp_path: Path) -> None:
    from megatron_vico.cli.generate import Flags
    from megatron_vico.inference.plans import Routing

    folder = shutil.copytree(export(run, "flash"), tmp_path / "flash")
    said = {"flash_relative_threshold": 0.3, "flash_absolute_threshold": 0.2}
    config = read_json(folder / "config.json") | said
    write_json(folder / "config.json", config | {"untrained_modules": [], "flash_mode": True})
    rule = Routing(rule="flash", relative_threshold=0.3, absolute_threshold=0.2)
    assert Flags(load=folder, prompt=("q",)).plan_source() == rule
    own = Flags(load=folder, prompt=("q",), router_rule="paper", router_granularity="image")
    found = own.plan_source()
    assert isinstance(found, Routing)
    assert (found.rule, found.granularity) == ("paper", "image")


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_dynamic_patch", "4"), ("use_thumbnail", 1), ("tile_tags", "x"), ("template", "phi3")],
)
def test_a_config_that_cannot_be_followed(field: str, value, run, tmp_path, ask) -> None:
    folder = shutil.copytree(export(run, "flash"), tmp_path / "odd")
    write_json(folder / "config.json", read_json(folder / "config.json") | {field: value})
    assert f"{field} is {value!r}" in ask(folder, status=2)[1]


FLASH = ("mode", "relative_threshold", "absolute_threshold")


@pytest.mark.parametrize("layout", ["internvl", "hf", "flash"])
def test_the_tokenizer_and_its_chat_template_are_those_of_training(layout: str, run: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    folder = export(run, layout)
    loaded, own = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    turns = [Turn("human", "What is red?"), Turn("gpt", "It."), Turn("human", "More?")]
    (expected,) = encode_prompt(turns, tiles_per_image=(), tokenizer=own)
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn.role], "content": turn.text} for turn in turns]
    found = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == expected.tolist()
    assert loaded.eos_token_id == own.eos_id
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id) == (own.eos_id, own.pad_id)


def test_lmdeploy_finds_flash_and_the_prompt_of_training(run: Path) -> None:
    """What LMDeploy 0.18.0 reads: it takes the folder's own template, into which it puts the image
    as text (its modules model, vl.model.internvl and pytorch.models.internvl)."""
    from transformers import AutoTokenizer

    folder = export(run, "flash")
    loaded, own = AutoTokenizer.from_pretrained(folder, use_fast=False), load_tokenizer(folder)
    asked = {"role": "user", "content": "<img><IMG_CONTEXT></img>\nWhat is red?"}
    found = loaded.apply_chat_template([asked], add_generation_prompt=True, return_dict=False)
    turns = [Turn("human", "<image>\nWhat is red?")]
    (expected,) = encode_prompt(turns, tiles_per_image=(1,), tokenizer=own)
    assert found == expected.tolist()
    text = loaded.apply_chat_template(
        [asked, {"role": "assistant", "content": "It."}], tokenize=False
    )
    assert text.endswith(f"It.{loaded.eos_token}\n")  # its stop word
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["InternVLChatModel"]
    assert config["llm_config"]["architectures"] == ["Qwen3ForCausalLM"]
    assert config["llm_config"]["eos_token_id"] == own.eos_id
    assert config["vision_config"]["image_size"] == config["force_image_size"]
    names = "select_layer downsample_ratio dynamic_image_size min_dynamic_patch max_dynamic_patch"
    for name in [*names.split(), "use_thumbnail", *(f"flash_{each}" for each in FLASH)]:
        assert name in config, name


def test_transformers_processor_finds_its_files(run: Path) -> None:
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    folder = export(run, "hf")
    config, images = (each.from_pretrained(folder) for each in (AutoConfig, AutoImageProcessor))
    assert (config.model_type, config.get_text_config().eos_token_id) == ("internvl", 3)
    assert (images.size["height"], tuple(images.image_mean)) == (32, IMAGENET_MEAN)
    loaded = AutoTokenizer.from_pretrained(folder)
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    text = loaded.apply_chat_template([image], tokenize=False)
    assert "<|im_start|>user\n<IMG_CONTEXT>\nWhat?<|im_end|>\n" in text
    names = (loaded.start_image_token, loaded.context_image_token, loaded.end_image_token)
    assert names == ("<img>", "<IMG_CONTEXT>", "</img>")
    assert loaded.context_image_token_id == 5
    assert loaded.video_token == "<video>"
    processor = read_json(folder / "processor_config.json")
    assert (processor["processor_class"], processor["image_seq_length"]) == ("InternVLProcessor", 4)
    assert read_json(folder / "preprocessor_config.json")["max_patches"] == 3


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_several_ends_of_an_answer_survive(where: str, run: Path, tmp_path: Path) -> None:
    source = shutil.copytree(export(run, "flash"), tmp_path / "source")
    for name in ("config.json", "generation_config.json"):
        contents = read_json(source / name)
        part = contents["llm_config"] if name == "config.json" else contents
        part["eos_token_id"] = [3, 0] if name == where else None
        (source / name).write_text(json.dumps(contents))
    for form, output, folder in (
        (["hf", "--to", "megatron"], "megatron", source),
        (["megatron", "--to", "hf", "--layout", "flash"], "back", tmp_path / "megatron"),
    ):
        files = ["--input", str(folder), "--output", str(tmp_path / output)]
        assert main(["convert", "--from", *form, *files]) == 0
    back = read_json(tmp_path / "back" / "config.json")["llm_config"]
    generation = read_json(tmp_path / "back" / "generation_config.json")
    assert back["eos_token_id"] == generation["eos_token_id"] == [3, 0]
