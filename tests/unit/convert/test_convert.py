"""Export, import and conversion: every trip there and back bit for bit, and every mismatch refused
by name."""

import errno
import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vico import files
from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.config.registry import MODELS, ModelConfig, get_model_config
from megatron_vico.convert import convert
from megatron_vico.convert.huggingface import safetensors_folder
from megatron_vico.convert.huggingface.config import ExportOptions
from megatron_vico.convert.names.internvl import LAYOUTS, Layout
from megatron_vico.data.encode.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_vico.errors import CheckpointError
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel
from tests.tensor_files import read_all, same
from tests.toy_models import make_encoder, make_language_model

TOYS = ("toy", "toy-6b", "toy-moe")
FLASH_ONLY = ("encoder.connector_16x.", "encoder.vir.")
DEAD = [f"pooling_before_gating.{part}{n}." for part in ("attn", "norm") for n in (3, 4)]

Export = Callable[[str, Layout], Path]


def modules_of(model: ModelConfig, *, seed: int) -> tuple[VisionEncoder, LanguageModel]:
    return make_encoder(model, seed=seed), make_language_model(model, seed=seed + 1)


def tensors_of(encoder: VisionEncoder, language_model: LanguageModel) -> dict[str, Tensor]:
    return convert.canonical_state({"encoder": encoder, "language_model": language_model})


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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    prefix = tmp_path_factory.mktemp("tokenizer") / "toy"
    return load_tokenizer(
        train_sentencepiece(["some text to learn from"] * 20, model_prefix=prefix, vocab_size=300)
    )


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, single_process_groups: None, tokenizer: Tokenizer
) -> Export:
    """A toy of some size as a Hugging Face folder in some layout, made once; its weights are those
    of seed 0."""
    root = tmp_path_factory.mktemp("exported")

    def export(size: str, layout: Layout) -> Path:
        folder = root / f"{size}-{layout}"
        if not folder.exists():
            model = get_model_config(size)
            encoder, language_model = modules_of(model, seed=0)
            convert.export_hf(
                folder,
                encoder=encoder,
                language_model=language_model,
                model=model,
                layout=layout,
                tokenizer=tokenizer,
                options=ExportOptions(flash_relative_threshold=0.25),
            )
        return folder

    return export


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", TOYS)
def test_megatron_to_files_and_back(size: str, layout: Layout, exported: Export) -> None:
    model = get_model_config(size)
    imported = convert.import_hf(exported(size, layout))
    assert (imported.model.name, imported.layout) == (size, layout)
    fresh = modules_of(model, seed=10)
    before = {name: tensor.clone() for name, tensor in tensors_of(*fresh).items()}
    convert.load_imported(imported, encoder=fresh[0], language_model=fresh[1])
    expected = tensors_of(*modules_of(model, seed=0))
    if layout != "flash":  # what the layout does not hold is left as it was
        expected |= {name: tensor for name, tensor in before.items() if name.startswith(FLASH_ONLY)}
        assert set(imported.absent) == {name for name in before if name.startswith(FLASH_ONLY)}
    assert same(tensors_of(*fresh), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", TOYS)
def test_files_to_megatron_and_back(
    size: str, layout: Layout, exported: Export, tmp_path: Path
) -> None:
    """Through the checkpoint folder that training reads and writes."""
    source = exported(size, layout)
    convert.convert(source, output=tmp_path / "megatron", layout="megatron")
    assert training_checkpoint.read_metadata(tmp_path / "megatron").model_size == size
    convert.convert(tmp_path / "megatron", output=tmp_path / "files", layout=layout)
    assert same(read_all(tmp_path / "files"), read_all(source))
    for path in source.iterdir():
        travels = path.name in (
            *safetensors_folder.TOKENIZER_FILES,
            "preprocessor_config.json",
            "generation_config.json",
        )
        if travels:
            assert (tmp_path / "files" / path.name).read_bytes() == path.read_bytes(), path.name


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
    convert.export_hf(
        tmp_path / "one", encoder=encoder, language_model=language_model, model=model, layout=layout
    )
    files = read_all(tmp_path / "one")
    assert len(files["language_model.lm_head.weight"]) == 301
    convert.convert(tmp_path / "one", output=tmp_path / "megatron", layout="megatron")
    convert.convert(tmp_path / "megatron", output=tmp_path / "two", layout=layout)
    assert same(read_all(tmp_path / "two"), files)


def test_bfloat16_stays_bfloat16_and_casts_when_asked(exported: Export, tmp_path: Path) -> None:
    source = exported("toy-6b", "flash")
    expected = {name: tensor.bfloat16() for name, tensor in read_all(source).items()}
    convert.convert(
        source,
        output=tmp_path / "bf16",
        layout="flash",
        options=convert.ConversionOptions(dtype="bf16"),
    )
    assert same(read_all(tmp_path / "bf16"), expected)
    assert files.read_json(tmp_path / "bf16/config.json")["torch_dtype"] == "bfloat16"
    convert.convert(tmp_path / "bf16", output=tmp_path / "megatron", layout="megatron")
    megatron = convert.open_source(tmp_path / "megatron")
    assert {form.dtype for form in megatron.forms.values()} == {torch.bfloat16}
    convert.convert(tmp_path / "megatron", output=tmp_path / "back", layout="flash")
    assert same(read_all(tmp_path / "back"), expected)


def test_between_layouts(exported: Export, tmp_path: Path) -> None:
    for target in ("hf", "internvl"):
        convert.convert(exported("toy-6b", "flash"), output=tmp_path / target, layout=target)  # type: ignore[arg-type]
        assert same(read_all(tmp_path / target), read_all(exported("toy-6b", target)))  # type: ignore[arg-type]
        assert (tmp_path / target / "tokenizer.json").exists()
    with pytest.raises(CheckpointError, match="no connector_16x and no ViR"):
        convert.convert(exported("toy-6b", "hf"), output=tmp_path / "flash", layout="flash")


def test_a_vico_start_depends_on_the_seed_alone(exported: Export, tmp_path: Path) -> None:
    """From a checkpoint without Flash modules: those are fresh and seeded, everything else is bit
    for bit."""
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        torch.rand(seed)  # the state of the generator must not matter
        convert.convert(
            exported("toy-6b", "hf"),
            output=tmp_path / name,
            layout="megatron",
            options=convert.ConversionOptions(seed=seed),
        )
        convert.convert(tmp_path / name, output=tmp_path / f"{name}-flash", layout="flash")
    one, equal, other = (read_all(tmp_path / f"{name}-flash") for name in ("one", "same", "other"))
    assert same(one, equal)
    base = read_all(exported("toy-6b", "internvl"))
    assert same({name: one[name] for name in base}, base)
    assert not torch.equal(one["mlp2.1.weight"], other["mlp2.1.weight"])
    assert not torch.equal(one["gating.block1.0.weight"], other["gating.block1.0.weight"])


def test_flash_folder_is_complete(exported: Export, tokenizer: Tokenizer) -> None:
    folder = exported("toy", "flash")
    config = files.read_json(folder / "config.json")
    assert config["flash_mode"] is True
    assert config["flash_relative_threshold"] == 0.25
    assert config["llm_config"]["eos_token_id"] == tokenizer.eos_id
    assert files.read_json(folder / "generation_config.json")["eos_token_id"] == tokenizer.eos_id
    assert {"preprocessor_config.json", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    names = read_all(folder).keys()
    for prefix in DEAD:
        assert any(name.startswith(prefix) for name in names), prefix


def change(folder: Path, target: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    tensors = read_all(folder)
    edit(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def test_tensor_too_many_or_too_few(exported: Export, tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["gating.block1.0.weigth"] = tensors.pop("gating.block1.0.weight")

    broken = change(exported("toy", "flash"), tmp_path / "broken", rename)
    message = (
        r"missing tensors: gating\.block1\.0\.weight; tensors that no row maps:"
        r" gating\.block1\.0\.weigth\."
    )
    with pytest.raises(CheckpointError, match=message):
        convert.import_hf(broken)


def test_misshapen_tensor(exported: Export, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"][:, 1:].contiguous()

    broken = change(exported("toy", "flash"), tmp_path / "broken", cut)
    with pytest.raises(
        CheckpointError, match=r"mlp1\.1\.weight has shape \(128, 383\), expected \(128, 384\)"
    ):
        convert.import_hf(broken)


def test_dead_tensors_may_not_be_left_out(exported: Export, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(tuple(DEAD))]:
            del tensors[name]

    broken = change(exported("toy", "flash"), tmp_path / "broken", drop)
    with pytest.raises(
        CheckpointError, match=r"pooling_before_gating\.attn3\.in_proj_bias.* and 2 more"
    ):
        convert.import_hf(broken)


def test_another_size_is_refused(exported: Export, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is toy-6b, expected toy:"):
        convert.import_hf(exported("toy-6b", "flash"), model_size="toy")
    convert.convert(exported("toy-6b", "flash"), output=tmp_path / "megatron", layout="megatron")
    with pytest.raises(CheckpointError, match=r"is of toy-6b, expected toy"):
        convert.convert(
            tmp_path / "megatron",
            output=tmp_path / "out",
            layout="hf",
            options=convert.ConversionOptions(model_size="toy"),
        )
    assert not (tmp_path / "out").exists()


def test_module_with_a_tensor_that_no_row_maps(tmp_path: Path, single_process_groups: None) -> None:
    model = get_model_config("toy-6b")
    encoder, language_model = modules_of(model, seed=0)
    encoder.extra = torch.nn.Linear(2, 2)
    with pytest.raises(
        CheckpointError, match=r"no row maps: encoder\.extra\.bias, encoder\.extra\.weight"
    ):
        convert.export_hf(
            tmp_path / "out",
            encoder=encoder,
            language_model=language_model,
            model=model,
            layout="flash",
        )
    assert not list(tmp_path.iterdir())


def test_module_of_another_size(exported: Export, tmp_path: Path) -> None:
    encoder, language_model = modules_of(get_model_config("toy-6b"), seed=0)
    with pytest.raises(CheckpointError, match=r"no row maps: .*q_layernorm"):
        convert.load_imported(
            convert.import_hf(exported("toy", "flash")),
            encoder=encoder,
            language_model=language_model,
        )
    wider = replace(
        get_model_config("toy-6b"),
        language=replace(get_model_config("toy-6b").language, hidden_size=64),
    )
    with pytest.raises(CheckpointError, match=r"has shape \(48, 160\), expected \(64, 160\)"):
        convert.export_hf(
            tmp_path / "out",
            encoder=encoder,
            language_model=language_model,
            model=wider,
            layout="flash",
        )


def test_input_is_never_touched(exported: Export, tmp_path: Path) -> None:
    source = exported("toy-6b", "flash")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    for output in (source, source / "within", tmp_path / "link" / "within"):
        with pytest.raises(CheckpointError, match=r"is the input .*, or within it"):
            convert.convert(source, output=output, layout="megatron")
    in_its_way = Path(shutil.copytree(source, tmp_path / "out.incomplete" / "source"))
    with pytest.raises(CheckpointError, match="would take its place"):
        convert.convert(in_its_way, output=tmp_path / "out", layout="megatron")
    assert in_its_way.is_dir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    for layout in ("megatron", "hf"):
        with pytest.raises(CheckpointError, match="not empty"):
            convert.convert(source, output=tmp_path / "taken", layout=layout)  # type: ignore[arg-type]
    convert.convert(source, output=tmp_path / "megatron", layout="megatron")
    with pytest.raises(CheckpointError, match="is a Megatron checkpoint already"):
        convert.convert(tmp_path / "megatron", output=tmp_path / "again", layout="megatron")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_full_disk_leaves_no_folder(
    exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported("toy-6b", "flash")

    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_folder, "write_shard", no_space)
    with pytest.raises(CheckpointError, match=r"could not write .*out: .*No space left on device"):
        convert.convert(source, output=tmp_path / "out", layout="hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["megatron", "internvl"])
def test_full_disk_is_what_the_error_says(layout: str, exported: Export, tmp_path: Path) -> None:
    """The limit on a file's size is the nearest that the kernel offers without root."""
    source = exported("toy-6b", "flash")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not write .*out: .*File too large"):
            convert.convert(source, output=tmp_path / "out", layout=layout)  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_broken_config_is_named(exported: Export, tmp_path: Path) -> None:
    broken = change(exported("toy", "flash"), tmp_path / "broken", lambda tensors: None)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(
        json.dumps(config | {"model_type": "llava", "architectures": ["Llava"]})
    )
    with pytest.raises(CheckpointError, match=r"broken/config\.json: model_type is 'llava'"):
        convert.import_hf(broken)
    (broken / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        convert.import_hf(broken)
