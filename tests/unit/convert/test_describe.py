"""What a folder holds and how two differ: known counts, and every kind of difference on purpose."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vico.cli.main import main
from megatron_vico.config.registry import ModelConfig, get_model_config
from megatron_vico.convert.compare import Comparison, compare
from megatron_vico.convert.convert import convert
from megatron_vico.convert.names.internvl import entries
from megatron_vico.convert.open import open_checkpoint
from megatron_vico.errors import CheckpointError
from tests.unit.convert.folders import MakeFolder, Tensors, changed_copy

TOY_MOE = get_model_config("toy-moe")
ODD = replace(
    TOY_MOE, name="odd", language=replace(TOY_MOE.language, vocab_size=301, num_experts=3)
)
"""Its vocabulary is padded in Megatron's form, to 384 rows."""

MODELS = [get_model_config("toy-6b"), TOY_MOE, ODD]
LAYER = "language_model.gpt.decoder.layers.{}."

Capture = pytest.CaptureFixture[str]


def name_of(model: ModelConfig) -> str:
    return model.name


def compared(first: Path, second: Path) -> Comparison:
    return compare(open_checkpoint(first), open_checkpoint(second))


def inspect(*words: str | Path) -> int:
    return main(["checkpoint", "inspect", *map(str, words)])


@pytest.mark.parametrize("model", MODELS, ids=name_of)
def test_every_form_has_the_same_weights(model: ModelConfig, folder_of: MakeFolder) -> None:
    flash = folder_of(model)
    found = compared(flash, folder_of(model, "megatron"))
    assert found.differences == ()
    assert found.num_same == len(entries(model, layout="flash"))
    for layout in ("internvl", "hf"):
        there = compared(flash, folder_of(model, layout)).differences
        back = compared(folder_of(model, layout), flash).differences
        assert {each.kind for each in there} == {"only in the first"}
        assert {each.kind for each in back} == {"only in the second"}
        flash_only = ("encoder.connector_16x.", "encoder.vir.")
        assert all(each.name.startswith(flash_only) for each in there)
        assert {each.name for each in there} == {each.name for each in back}


@pytest.mark.parametrize("model", MODELS, ids=name_of)
@pytest.mark.parametrize("form", ["flash", "internvl", "hf", "megatron"])
def test_sums_are_those_of_the_size(
    model: ModelConfig, form: str, folder_of: MakeFolder, capsys: Capture
) -> None:
    assert inspect(folder_of(model, form), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    counts = model.parameter_counts()
    assert shown["problems"] == []
    padding = 2 * (384 - 301) * 48 if (model, form) == (ODD, "megatron") else 0
    expected = {"vit": counts.vit, "connector_4x": counts.connector_4x}
    expected["language_model"] = counts.language_model + padding
    if form in ("flash", "megatron"):
        expected |= {"connector_16x": counts.connector_16x, "vir": counts.vir}
    expected["weights"] = sum(expected.values())
    parts = [shown["modules"].pop(name) for name in set(shown["modules"]) - set(expected)]
    assert {name: each["parameters"] for name, each in shown["modules"].items()} == expected
    # The language model's parts are apart and whole.
    assert sum(each["parameters"] for each in parts) == expected["language_model"]
    assert all(each["bytes"] == 4 * each["parameters"] for each in shown["modules"].values())
    assert all(each["dtypes"] == ["float32"] for each in shown["modules"].values())
    if form == "megatron":
        facts = [shown[name] for name in ("stage", "iteration", "has_optimizer")]
        assert facts == ["converted", "0", "False"]
    else:
        assert shown["layout"] == form


def test_text_is_for_people_and_for_scripts(folder_of: MakeFolder, capsys: Capture) -> None:
    path = str(folder_of("toy-moe", "megatron"))
    assert main(["checkpoint", path]) == 0  # examples/vico_241b.sh leaves `inspect` out
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("iter_0000000")
    assert {"  iteration: 0", "  form: Megatron", "  model_size: toy-moe"} <= set(lines)
    rows = [line.split() for line in lines]
    assert ["weights", "162", "309,058", "1,236,232", "float32"] in rows
    assert ["experts", "32", "73,728", "294,912", "float32"] in rows
    assert ["norms", "9", "432", "1,728", "float32"] in rows


def test_tensors_are_listed_and_chosen(folder_of: MakeFolder, capsys: Capture) -> None:
    words = ("--tensors", "--match", "layers.1.*gate_proj")
    assert inspect(*words, folder_of("toy-6b", "hf")) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "gate_proj" in line]
    assert rows == [
        ["language_model.model.layers.1.mlp.gate_proj.weight", "float32", "96x48", "18,432"]
    ]
    assert inspect(*words, "--json", folder_of("toy-moe", "hf")) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert [each["name"].split(".")[-3] for each in tensors] == ["0", "1", "2", "3"]
    assert {each["module"] for each in tensors} == {"language_model experts"}
    assert inspect(*words, folder_of("toy-6b", "megatron")) == 2
    assert "no tensor of" in capsys.readouterr().err
    for word in ("--match", "--diff-ckpt-step"):
        assert inspect(word, "1", folder_of("toy-6b", "hf")) == 2
        assert f"ConfigError: {word}" in capsys.readouterr().err


def test_a_changed_number_is_measured(
    folder_of: MakeFolder, tmp_path: Path, capsys: Capture
) -> None:
    name = LAYER.format(1) + "self_attention.linear_qkv.weight"

    def edit(tensors: Tensors) -> None:
        tensors["language_model.model.layers.1.self_attn.k_proj.weight"][3, 5] += 0.5

    other = changed_copy(folder_of("toy-6b", "hf"), tmp_path / "other", tensors=edit)
    (found,) = compared(folder_of("toy-6b", "internvl"), other).differences
    assert (found.name, found.kind) == (name, "values differ")
    fused = open_checkpoint(folder_of("toy-6b", "internvl")).read_tensor(name)
    # Measured 3e-8 for both: the sum is rounded to float32.
    assert found.max_difference == pytest.approx(0.5, rel=1e-6)
    assert found.relative_norm == pytest.approx(0.5 / fused.double().norm().item(), rel=1e-6)
    words = (folder_of("toy-6b", "megatron"), "--diff", other)
    assert inspect(*words, "--match", "layers.1.") == 1
    title = f"values differ: 1 tensors\n  tensor{' ' * (len(name) - 6)}  max difference"
    assert title in capsys.readouterr().out
    assert inspect(*words, "--match", "layers.0.") == 0
    assert inspect(*words, "--match", "no such") == 2
    capsys.readouterr()
    assert inspect(*words, "--json") == 1
    shown = json.loads(capsys.readouterr().out)
    assert not shown["equal"]
    assert shown["differences"][-1]["name"] == name


def test_every_kind_of_difference(folder_of: MakeFolder, tmp_path: Path) -> None:
    layer, gpt = "language_model.model.layers.0.", LAYER.format(0)
    norm = gpt + "self_attention.linear_qkv.layer_norm_weight"

    def edit(tensors: Tensors) -> None:
        down = layer + "mlp.down_proj.weight"
        tensors["mlp2.1.weight"] = tensors["mlp2.1.weight"].bfloat16()
        tensors[down] = tensors[down][:, 1:].contiguous()
        tensors[layer + "input_layernorm.weight"][0] = torch.nan
        tensors["mlp1.0.bias"].zero_()
        tensors["extra.weight"] = torch.ones(())
        del tensors[layer + "mlp.up_proj.weight"]

    flash = folder_of("toy-6b")
    other = changed_copy(flash, tmp_path / "other", tensors=edit)
    differences = compared(folder_of("toy-6b", "megatron"), other).differences
    found = {each.name: each for each in differences}
    assert {name: each.kind for name, each in found.items()} == {
        "encoder.connector_16x.linear_1.weight": "dtype differs",
        "encoder.connector_4x.norm.bias": "values differ",
        norm: "values differ",
        # What cannot be put together is compared under the file's own names.
        gpt + "mlp.linear_fc1.weight": "only in the first",
        layer + "mlp.gate_proj.weight": "only in the second",
        gpt + "mlp.linear_fc2.weight": "only in the first",
        layer + "mlp.down_proj.weight": "only in the second",
        "extra.weight": "only in the second",
    }
    rounded = found["encoder.connector_16x.linear_1.weight"]
    assert rounded.relative_norm is not None
    # Half a unit of bfloat16's last place; measured 0.0017.
    assert 0 < rounded.relative_norm < 2**-8
    assert (rounded.first, rounded.second) == ("float32 [96, 640]", "bfloat16 [96, 640]")
    assert found["encoder.connector_4x.norm.bias"].relative_norm == 1.0
    assert str(found[norm].max_difference) == "nan"
    assert compared(other, other).differences == ()  # a NaN is equal to the same NaN, and 0 to 0
    zero = {each.name: each for each in compared(other, flash).differences}
    assert str(zero["encoder.connector_4x.norm.bias"].relative_norm) == "inf"
    assert inspect(other, "--diff", flash, "--json") == 1


def test_shapes_of_two_sizes(folder_of: MakeFolder) -> None:
    differences = compared(folder_of("toy-moe", "hf"), folder_of(ODD, "megatron")).differences
    kinds = {each.name: each.kind for each in differences}
    mlp = LAYER.format(2) + "mlp."
    assert kinds[mlp + "router.weight"] == "shape differs"
    assert kinds[mlp + "experts.experts.3.linear_fc1.weight"] == "only in the first"


def test_one_pair_of_tensors_is_in_memory_at_a_time(folder_of: MakeFolder) -> None:
    alive, peak = 0, 0

    def counted(read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        def read_and_count(name: str) -> Tensor:
            nonlocal alive, peak
            tensor = read(name)
            alive += 1
            peak = max(peak, alive)
            weakref.finalize(tensor, lower)
            return tensor

        return read_and_count

    def lower() -> None:
        nonlocal alive
        alive -= 1

    sources = [open_checkpoint(folder_of("toy-moe", form)) for form in ("flash", "megatron")]
    spied = [replace(each, read_tensor=counted(each.read_tensor)) for each in sources]
    assert compare(*spied).differences == ()
    assert peak == 2


def test_an_iteration_folder_and_steps(folder_of: MakeFolder) -> None:
    run = folder_of("toy-moe", "megatron")
    assert open_checkpoint(run / "iter_0000000").where == open_checkpoint(run, iteration=0).where
    with pytest.raises(CheckpointError, match="iter_0000007 is no finished checkpoint"):
        open_checkpoint(run, iteration=7)
    with pytest.raises(CheckpointError, match="has no steps"):
        open_checkpoint(folder_of("toy-moe", "hf"), iteration=0)
    with pytest.raises(CheckpointError, match="is of toy-moe, expected toy"):
        open_checkpoint(run, model_size="toy")


def test_a_file_of_a_run_that_is_cut_short_while_it_is_read(
    folder_of: MakeFolder, tmp_path: Path
) -> None:
    run = convert(folder_of("toy-6b"), output=tmp_path / "run", layout="megatron")
    opened = open_checkpoint(run)
    file = next(run.glob("iter_*/*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = r"could not read \S+ from .*iter_0000000: .*copy the folder again"
    with pytest.raises(CheckpointError, match=message):
        compare(open_checkpoint(folder_of("toy-6b", "hf")), opened)
