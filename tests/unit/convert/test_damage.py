"""Damaged folders: every command names the file or the tensor, and writes nothing."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from megatron_vico.cli.main import main
from megatron_vico.config.schema import ParallelOptions
from megatron_vico.convert.combine import open_parts
from megatron_vico.convert.convert import convert
from megatron_vico.convert.open import open_checkpoint, open_source
from megatron_vico.convert.options import ConversionOptions
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.errors import CheckpointError
from megatron_vico.inference.loading import build_engine, load_weights, model_of
from megatron_vico.parallel.groups import started
from tests.folder_state import state_of
from tests.unit.convert.folders import MakeFolder, Tensors, changed_copy

SMALL = ConversionOptions(max_shard_bytes=100_000)
"""So that toys make several files."""

LAYER = "language_model.model.layers.0."
DEAD = tuple(f"pooling_before_gating.{part}{n}." for part in ("attn", "norm") for n in (3, 4))

COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "convert to megatron": lambda source, out: convert(source, output=out, layout="megatron"),
    "convert to internvl": lambda source, out: convert(source, output=out, layout="internvl"),
    "inspect": lambda source, out: open_checkpoint(source),
    # As a vision tower: damage to files is found before anything else is looked at.
    "combine": lambda source, out: open_parts(source, source),
}


def change_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        contents = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(contents | changes))

    return change


def change_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        contents = json.loads(index.read_text())
        change(contents["weight_map"])
        index.write_text(json.dumps(contents))

    return damage


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def instead_of_first(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = shard(folder, 0)
        path.unlink()
        make(path)

    return damage


def cut_last_shard(folder: Path) -> None:
    shard(folder, -1).write_bytes(shard(folder, -1).read_bytes()[:-3])


def add_second_copy(folder: Path) -> None:
    save_file({"mlp1.1.bias": torch.ones(2)}, folder / "model-00099.safetensors")
    change_index(lambda files: files.update({"mlp1.1.bias": "model-00099.safetensors"}))(folder)


INDEX = "model.safetensors.index.json"
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (cut_last_shard, r"00\d+\.safetensors \(\d+ bytes\) is cut short .*copy it again"),
    "other kind": (
        lambda folder: shard(folder, 0).write_bytes(b"\x10" + bytes(7) + b"PK not a header!"),
        "not a safetensors file",
    ),
    "no shard": (
        lambda folder: shard(folder, 0).unlink(),
        r"index\.json names model-00001-of-\d+\.safetensors, absent from the folder",
    ),
    "absent file": (
        change_index(lambda files: files.update({"mlp1.1.bias": "model-00099.safetensors"})),
        r"index\.json names model-00099\.safetensors, absent from the folder",
    ),
    "pipe": (
        instead_of_first(os.mkfifo),
        r"could not read \S+safetensors: .*not a plain file",
    ),
    "device": (
        instead_of_first(lambda path: path.symlink_to("/dev/zero")),
        r"could not read \S+safetensors: .*not a plain file",
    ),
    "endless": (
        change_json("config.json", llm_config={"num_hidden_layers": 10**12}),
        "language.num_layers is 1000000000000, expected a whole number from 1 to 1024|as --vit",
    ),
    "other types": (
        change_json("config.json", llm_config=[], vision_config="x"),
        r"vision_config is 'x', expected a JSON object; llm_config is \[\], exp|as --vit",
    ),
    "two sets": (
        lambda folder: save_file({"first": torch.ones(4)}, folder / "model.safetensors"),
        "two sets of weights",
    ),
    "twice": (add_second_copy, r"holds tensors that .* holds too: mlp1\.1\.bias"),
    "ghost": (
        change_index(lambda files: files.update(ghost=files["mlp1.1.bias"])),
        "promises tensors that its files do not hold: ghost",
    ),
    "broken index": (lambda folder: (folder / INDEX).write_text("{"), "not valid JSON"),
    "list": (change_json(INDEX, weight_map=["first"]), "weight_map is no table"),
    "number": (change_json(INDEX, weight_map={"first": 1}), "weight_map is no table"),
    "elsewhere": (
        change_json(INDEX, weight_map={"first": "../model.safetensors"}),
        "weight_map is no table",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"config\.json: no such file",
    ),
    "other model": (
        change_json("config.json", model_type="llava", architectures=["Llava"]),
        r"config\.json: model_type is 'llava'",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", FILES)
def test_damaged_files(damage: str, command: str, folder_of: MakeFolder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    convert(folder_of("toy-6b"), output=source, layout="flash", options=SMALL)
    act, message = FILES[damage]
    act(source)
    before = state_of(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        COMMANDS[command](source, tmp_path / "out")
    assert state_of(tmp_path) == before, "nothing was begun"


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return edit


def change(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return edit


def drop_dead(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(DEAD)]:
        del tensors[name]


TENSORS: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "renamed": (
        "toy",
        rename("gating.block1.0.weight", "gating.block1.0.weigth"),
        r"missing tensors: gating\.block1\.0\.weight; tensors that no row maps:"
        r" gating\.block1\.0\.weigth$",
    ),
    "expert too many": (
        "toy-moe",
        rename(f"{LAYER}mlp.experts.3.up_proj.weight", f"{LAYER}mlp.experts.4.up_proj.weight"),
        r"missing tensors: \S+experts\.3\.up_proj\.weight; .*: \S+experts\.4\.up_proj\.weight$",
    ),
    "wrong shape": (
        "toy",
        change("mlp1.1.weight", lambda tensor: tensor[:, 1:]),
        r"wrong shape or format: .*model\.safetensors: mlp1\.1\.weight has shape \(128, 383\),"
        r" expected \(128, 384\)$",
    ),
    "dead ones left out": ("toy", drop_dead, r"pooling_before_gating\.attn3\.in_proj_bias.* and 2"),
    "two formats": (
        "toy-6b",
        change(f"{LAYER}self_attn.k_proj.weight", lambda tensor: tensor.bfloat16()),
        r"q_proj\.weight is float32, \S+k_proj\.weight is bfloat16, .*; tensors that Megatron"
        r" joins need one format$",
    ),
    "integers": (
        "toy-6b",
        change("mlp1.1.weight", lambda tensor: tensor.to(torch.int8)),
        r"mlp1\.1\.weight is int8, expected bfloat16, float16 or float32$",
    ),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_damaged_tensors(damage: str, folder_of: MakeFolder, tmp_path: Path) -> None:
    """Conversions refuse them; inspection lists them."""
    size, edit, message = TENSORS[damage]
    source = changed_copy(folder_of(size), tmp_path / "source", tensors=edit)
    for command in ("convert to megatron", "convert to internvl"):
        with pytest.raises(CheckpointError, match=message.removesuffix("$")):
            COMMANDS[command](source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing was begun"
    found = "; ".join(open_checkpoint(source).problems)
    assert re.search(message, found), found


def as_modules(name: str, wrapper: str = "") -> str:
    if name.startswith("language_model.lm_head."):
        return wrapper + name.removeprefix("language_model.")
    return f"{wrapper}model." + name.replace("language_model.model.", "language_model.", 1)


@pytest.mark.parametrize("wrapper", ["", "module.", "module._orig_mod."])
def test_names_of_transformers_modules_are_read(
    wrapper: str, folder_of: MakeFolder, tmp_path: Path
) -> None:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[as_modules(name, wrapper)] = tensors.pop(name)

    native = folder_of("toy-6b", "hf")
    source = changed_copy(native, tmp_path / "source", tensors=edit)
    expected, found = open_source(native), open_source(source)
    assert list(found.tensors) == list(expected.tensors)
    for name in list(found.tensors)[::7]:
        assert torch.equal(found.read_tensor(name), expected.read_tensor(name))


def test_layouts_that_are_taken_for_one_another(folder_of: MakeFolder, tmp_path: Path) -> None:
    """By the command line, by the config.json beside the weights, and by a field in their own."""
    native, flash = folder_of("toy-6b", "hf"), folder_of("toy-6b")
    options = ConversionOptions(input_layout="flash")
    with pytest.raises(CheckpointError, match=r"the hf layout, expected flash; give --layout hf"):
        convert(native, output=tmp_path / "out", layout="megatron", options=options)
    other_config = json.loads((flash / "config.json").read_text())
    source = changed_copy(
        native, tmp_path / "source", config=lambda own: (own.clear(), own.update(other_config))
    )
    with pytest.raises(
        CheckpointError, match=r"model_type 'internvl_chat' .* transformers' own layout"
    ):
        convert(source, output=tmp_path / "out", layout="megatron")
    flash_mode = changed_copy(
        native, tmp_path / "flash_mode", config=lambda own: own.update(flash_mode=True)
    )
    with pytest.raises(CheckpointError, match=r"model_type 'internvl' .* has no Flash form"):
        convert(flash_mode, output=tmp_path / "out", layout="megatron")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["convert to internvl", "inspect"])
def test_megatron_files(command: str, folder_of: MakeFolder, tmp_path: Path) -> None:
    run = convert(folder_of("toy-6b"), output=tmp_path / "run", layout="megatron", options=SMALL)
    act = COMMANDS[command]
    last = sorted(run.rglob("*.distcp"), key=lambda path: int(path.stem.split("_")[-1]))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"iter_0000000: {last.name} cut short; copy"):
        act(run, tmp_path / "out")
    last.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {last.name}, which its \.metadata"):
        act(run, tmp_path / "out")
    last.write_bytes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def flip(path: Path) -> None:
    """Change one bit among the numbers of a file."""
    contents = bytearray(path.read_bytes())
    contents[-200 if path.suffix == ".safetensors" else len(contents) // 2] ^= 1
    path.write_bytes(contents)


def answers(source: Path, tokenizer: Tokenizer) -> None:
    """What `vico generate` and `evaluate` do before they answer."""
    with started(ParallelOptions(), seed=0, timeout_minutes=1) as groups:
        settings = EncodingSettings(image_size=32)
        engine = build_engine(
            model_of(source), groups=groups, tokenizer=tokenizer, settings=settings
        )
        load_weights(engine, source)


@pytest.mark.parametrize("form", ["flash", "megatron"])
def test_flipped_bits(
    form: Literal["flash", "megatron"],
    folder_of: MakeFolder,
    tmp_path: Path,
    tokenizer: Tokenizer,
    single_process_groups: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every command that takes weights names the file; `verify` names any file."""
    source = convert(folder_of("toy-6b"), output=tmp_path / "run", layout=form, options=SMALL)
    folder = source / "iter_0000000" if form == "megatron" else source
    assert main(["checkpoint", "verify", str(source)]) == 0
    assert re.search(rf"^{folder}: \d+ files intact$", capsys.readouterr().out)
    answers(source, tokenizer)
    weights = max(folder.glob("*.*"), key=lambda path: path.stat().st_size)
    flip(weights)
    message = rf"{folder.name} is damaged: {weights.name} differs from its checksum; copy or make"
    if form == "megatron":
        message = message.replace("copy or make", "no other checkpoint in")
    commands = [COMMANDS["convert to internvl"], lambda source, out: answers(source, tokenizer)]
    for command in commands if form == "megatron" else (*commands, COMMANDS["convert to megatron"]):
        with pytest.raises(CheckpointError, match=message):
            command(source, tmp_path / "out")
    config = folder / ("config.yaml" if form == "megatron" else "config.json")
    config.write_text(config.read_text() + " ")
    (folder / "metadata.json" if form == "megatron" else shard(folder, 0)).unlink()
    for path in (source, folder):
        assert main(["checkpoint", "verify", str(path)]) == 1
    told = capsys.readouterr().out
    for clause in (rf"{weights.name} differs", rf"{config.name} has \d+ bytes, \d+ were", "absent"):
        assert re.search(clause, told), told
    (folder / "checksums.json").unlink()
    assert main(["checkpoint", "verify", str(source)]) == 2
    assert "whether the files are as they were written cannot be known" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing was begun"


@pytest.mark.parametrize("command", COMMANDS)
def test_folders_that_are_none(command: str, tmp_path: Path) -> None:
    for name in ("empty", "run.incomplete"):
        (tmp_path / name).mkdir()
    for name, message in (
        ("absent", "no such folder"),
        ("run.incomplete", "never finished"),
        ("empty", r"no safetensors folder|it has neither latest"),
    ):
        with pytest.raises(CheckpointError, match=message):
            COMMANDS[command](tmp_path / name, tmp_path / "out")
