"""Export, import and conversion: every trip there and back bit for bit, and refusals by name."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vico import files
from megatron_vico.checkpoint.run_folder import read_metadata
from megatron_vico.config.registry import MODELS, ModelConfig, get_model_config
from megatron_vico.convert.convert import convert
from megatron_vico.convert.huggingface.export import TOKENIZER_FILES
from megatron_vico.convert.modules import canonical_state, load_source
from megatron_vico.convert.open import open_source
from megatron_vico.convert.options import LAYOUTS, ConversionOptions, Layout
from megatron_vico.data.encode.tokenizer import Tokenizer, load_tokenizer
from megatron_vico.errors import CheckpointError
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel
from tests.hf_exports import export_hf
from tests.tensor_files import read_all, same
from tests.toy_models import make_encoder, make_language_model
from tests.unit.convert.folders import MakeFolder

TOYS = ("toy", "toy-6b", "toy-moe")
FLASH_ONLY = ("encoder.connector_16x.", "encoder.vir.")


def modules_of(model: ModelConfig, *, seed: int) -> tuple[VisionEncoder, LanguageModel]:
    return make_encoder(model, seed=seed), make_language_model(model, seed=seed + 1)


def tensors_of(encoder: VisionEncoder, language_model: LanguageModel) -> dict[str, Tensor]:
    return canonical_state({"encoder": encoder, "language_model": language_model})


def add_model(
    patch: pytest.MonkeyPatch, name: str, base: str, *, num_experts: int | None = None
) -> ModelConfig:
    """A model whose vocabulary, heads and experts divide by nothing."""
    model = get_model_config(base)
    language = replace(
        model.language, vocab_size=301, num_heads=9, num_query_groups=3, num_experts=num_experts
    )
    vision = replace(model.vision, hidden_size=28, num_heads=7)
    model = replace(model, name=name, vision=vision, language=language)
    patch.setitem(MODELS, name, model)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", TOYS)
def test_megatron_to_files_and_back(size: str, layout: Layout, folder_of: MakeFolder) -> None:
    source = open_source(folder_of(size, layout))
    assert (source.model.name, source.layout) == (size, layout)
    encoder, language_model = modules_of(get_model_config(size), seed=10)
    before = {name: each.clone() for name, each in tensors_of(encoder, language_model).items()}
    load_source(source, encoder=encoder, language_model=language_model)
    expected = tensors_of(*modules_of(get_model_config(size), seed=0))
    if layout != "flash":  # what the layout does not hold is left as it was
        kept = {name: tensor for name, tensor in before.items() if name.startswith(FLASH_ONLY)}
        assert before.keys() - source.tensors.keys() == kept.keys()
        expected |= kept
    assert same(tensors_of(encoder, language_model), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", TOYS)
def test_files_to_megatron_and_back(
    size: str, layout: Layout, folder_of: MakeFolder, tmp_path: Path
) -> None:
    """Through the checkpoint folder that training reads and writes."""
    source = folder_of(size, layout)
    convert(source, output=tmp_path / "megatron", layout="megatron")
    assert read_metadata(tmp_path / "megatron").model_size == size
    convert(tmp_path / "megatron", output=tmp_path / "files", layout=layout)
    assert same(read_all(tmp_path / "files"), read_all(source))
    travel = {*TOKENIZER_FILES, "preprocessor_config.json", "generation_config.json"}
    names = {path.name for path in source.iterdir()} & travel
    assert {"tokenizer.json", "preprocessor_config.json", "generation_config.json"} <= names
    for name in names:
        assert (tmp_path / "files" / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("base", "num_experts"), [("toy", None), ("toy-6b", None), ("toy-moe", 5)])
@pytest.mark.usefixtures("single_process_groups")
def test_numbers_that_divide_by_nothing(
    base: str,
    num_experts: int | None,
    layout: Layout,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both kinds of vision tower, dense and with experts."""
    model = add_model(monkeypatch, "odd", base, num_experts=num_experts)
    encoder, language_model = modules_of(model, seed=0)
    assert language_model.gpt.vocab_size > model.language.vocab_size  # padded
    one = export_hf(
        tmp_path / "one", encoder=encoder, language_model=language_model, model=model, layout=layout
    )
    assert len(read_all(one)["language_model.lm_head.weight"]) == 301
    convert(one, output=tmp_path / "megatron", layout="megatron")
    two = convert(tmp_path / "megatron", output=tmp_path / "two", layout=layout)
    assert same(read_all(two), read_all(one))


def test_bfloat16_stays_bfloat16_and_casts_when_asked(
    folder_of: MakeFolder, tmp_path: Path
) -> None:
    source = folder_of("toy-6b")
    expected = {name: tensor.bfloat16() for name, tensor in read_all(source).items()}
    options = ConversionOptions(dtype="bf16")
    bf16 = convert(source, output=tmp_path / "bf16", layout="flash", options=options)
    assert same(read_all(bf16), expected)
    assert files.read_json(bf16 / "config.json")["torch_dtype"] == "bfloat16"
    run = convert(bf16, output=tmp_path / "megatron", layout="megatron")
    assert {info.dtype for info in open_source(run).tensors.values()} == {torch.bfloat16}
    back = convert(run, output=tmp_path / "back", layout="flash")
    assert same(read_all(back), expected)


def test_between_layouts(folder_of: MakeFolder, tmp_path: Path) -> None:
    targets: tuple[Layout, ...] = ("hf", "internvl")
    for target in targets:
        made = convert(folder_of("toy-6b"), output=tmp_path / target, layout=target)
        assert same(read_all(made), read_all(folder_of("toy-6b", target)))
        assert (made / "tokenizer.json").exists()
    with pytest.raises(CheckpointError, match="no connector_16x and no ViR"):
        convert(folder_of("toy-6b", "hf"), output=tmp_path / "flash", layout="flash")


def test_a_vico_start_depends_on_the_seed_alone(folder_of: MakeFolder, tmp_path: Path) -> None:
    """Fresh and seeded are the modules that a checkpoint lacks; everything else is bit for bit."""
    made = []
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        torch.rand(seed)  # the state of the generator must not matter
        source, options = folder_of("toy-6b", "hf"), ConversionOptions(seed=seed)
        run = convert(source, output=tmp_path / name, layout="megatron", options=options)
        made.append(read_all(convert(run, output=tmp_path / f"{name}-flash", layout="flash")))
    one, equal, other = made
    assert same(one, equal)
    base = read_all(folder_of("toy-6b", "internvl"))
    assert same({name: one[name] for name in base}, base)
    for name in ("mlp2.1.weight", "gating.block1.0.weight"):
        assert not torch.equal(one[name], other[name])


def test_flash_folder_is_complete(folder_of: MakeFolder, tokenizer: Tokenizer) -> None:
    folder = folder_of("toy")
    config = files.read_json(folder / "config.json")
    assert config["flash_mode"] is True
    assert config["flash_relative_threshold"] == 0.25
    assert config["llm_config"]["eos_token_id"] == tokenizer.eos_id
    assert files.read_json(folder / "generation_config.json")["eos_token_id"] == tokenizer.eos_id
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint


def test_another_size_is_refused(folder_of: MakeFolder, tmp_path: Path) -> None:
    for form in ("flash", "megatron"):
        source = folder_of("toy-6b", form)
        with pytest.raises(CheckpointError, match="toy-6b, expected toy: "):
            open_source(source, model_size="toy")
        options = ConversionOptions(model_size="toy-moe")
        with pytest.raises(CheckpointError, match=r"toy-6b, expected toy-moe: "):
            convert(source, output=tmp_path / "out", layout="hf", options=options)
    assert not list(tmp_path.iterdir())


def test_modules_that_are_not_the_tables(folder_of: MakeFolder, tmp_path: Path) -> None:
    """With a tensor that no row maps, and of another width."""
    source = open_source(folder_of("toy"))
    encoder, language_model = modules_of(get_model_config("toy-6b"), seed=0)
    with pytest.raises(CheckpointError, match=r"no row maps: .*q_layernorm"):
        load_source(source, encoder=encoder, language_model=language_model)
    model = get_model_config("toy")
    wider = replace(model, language=replace(model.language, hidden_size=64))
    encoder, language_model = modules_of(wider, seed=0)
    with pytest.raises(CheckpointError, match=r"has shape \(64, 384\), expected \(128, 384\)"):
        load_source(source, encoder=encoder, language_model=language_model)


def test_input_is_never_touched(folder_of: MakeFolder, tmp_path: Path) -> None:
    source = folder_of("toy-6b")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    for output in (source, source / "within", tmp_path / "link" / "within"):
        with pytest.raises(CheckpointError, match=r"is the input .*, or within it"):
            convert(source, output=output, layout="megatron")
    in_its_way = Path(shutil.copytree(source, tmp_path / "out.incomplete" / "source"))
    with pytest.raises(CheckpointError, match="would take its place"):
        convert(in_its_way, output=tmp_path / "out", layout="megatron")
    assert in_its_way.is_dir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    for layout in ("megatron", "hf"):
        with pytest.raises(CheckpointError, match="not empty"):
            convert(source, output=tmp_path / "taken", layout=layout)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is a Megatron checkpoint already"):
        convert(folder_of("toy-6b", "megatron"), output=tmp_path / "again", layout="megatron")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
