"""What a folder holds and how two differ: counts that are known, and every kind of difference made
on purpose."""

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vico.cli.main import main
from megatron_vico.config.registry import MODELS, get_model_config
from megatron_vico.convert import convert
from megatron_vico.convert.compare import Comparison, compare
from megatron_vico.convert.describe import open_checkpoint
from megatron_vico.convert.names.internvl import Layout, entries
from megatron_vico.errors import CheckpointError
from tests.toy_models import make_encoder, make_language_model

SIZES = ("toy-6b", "toy-moe", "odd")

Folder = Callable[[str, str], Path]
Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, single_process_groups: None
) -> Iterator[Folder]:
    """The weights of seed 0 of some size, as a Hugging Face folder of some layout or as a run's
    folder; made once."""
    root = tmp_path_factory.mktemp("folders")
    base = get_model_config("toy-moe")
    # Its vocabulary is padded in Megatron's form, to 384 rows.
    MODELS["odd"] = replace(
        base, name="odd", language=replace(base.language, vocab_size=301, num_experts=3)
    )

    def make(size: str, form: str) -> Path:
        path = root / f"{size}-{form}"
        if path.exists():
            return path
        if form == "megatron":
            convert.convert(make(size, "flash"), output=path, layout="megatron")
            return path
        model = get_model_config(size)
        encoder, language_model = make_encoder(model), make_language_model(model)
        layout: Layout = form  # type: ignore[assignment]
        return convert.export_hf(
            path, encoder=encoder, language_model=language_model, model=model, layout=layout
        )

    yield make
    del MODELS["odd"]


def changed(folder: Path, target: Path, edit: Edit) -> Path:
    """A copy of a Hugging Face folder with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def compared(first: Path, second: Path) -> Comparison:
    return compare(open_checkpoint(first), open_checkpoint(second))


@pytest.mark.parametrize("size", SIZES)
def test_every_form_has_the_same_weights(size: str, folder: Folder) -> None:
    flash = folder(size, "flash")
    found = compared(flash, folder(size, "megatron"))
    assert found.differences == ()
    num_tensors = len(entries(get_model_config(size), layout="flash"))
    assert found.num_same == num_tensors
    for layout in ("internvl", "hf"):
        found = compared(flash, folder(size, layout))
        assert {each.kind for each in found.differences} == {"only in the first"}
        assert all(
            each.name.startswith(("encoder.connector_16x.", "encoder.vir."))
            for each in found.differences
        )
        assert found.num_same + len(found.differences) == num_tensors
        backwards = compared(folder(size, layout), flash)
        assert {each.kind for each in backwards.differences} == {"only in the second"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["flash", "internvl", "hf", "megatron"])
def test_sums_are_those_of_the_size(
    size: str, form: str, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "inspect", str(folder(size, form)), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    counts = get_model_config(size).parameter_counts()
    assert shown["problems"] == []
    assert shown["model_size"] == size
    padding = 2 * (384 - 301) * 48 if (size, form) == ("odd", "megatron") else 0
    expected = {"vit": counts.vit, "connector_4x": counts.connector_4x}
    expected["language_model"] = counts.language_model + padding
    if form in ("flash", "megatron"):
        expected |= {"connector_16x": counts.connector_16x, "vir": counts.vir}
    expected["weights"] = sum(expected.values())
    parts = [shown["modules"].pop(name) for name in set(shown["modules"]) - set(expected)]
    assert {name: each["parameters"] for name, each in shown["modules"].items()} == expected
    assert (
        sum(each["parameters"] for each in parts) == expected["language_model"]
    )  # its parts are apart and whole
    assert all(each["bytes"] == 4 * each["parameters"] for each in shown["modules"].values())
    assert all(each["dtypes"] == ["float32"] for each in shown["modules"].values())
    if form == "megatron":
        assert (shown["stage"], shown["iteration"], shown["has_optimizer"]) == (
            "converted",
            "0",
            "False",
        )
    else:
        assert shown["layout"] == form


def test_text_is_for_people_and_for_scripts(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder("toy-moe", "megatron")
    assert (
        main(["checkpoint", str(path)]) == 0
    )  # `inspect` may be left out: examples/vico_241b.sh reads this
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("iter_0000000")
    assert "  iteration: 0" in lines
    assert "  form: Megatron" in lines
    rows = [line.split() for line in lines]
    assert ["weights", "162", "309,058", "1,236,232", "float32"] in rows
    assert ["experts", "32", "73,728", "294,912", "float32"] in rows


def test_tensors_are_listed_and_chosen(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["checkpoint", "inspect", "--tensors", "--match", "layers.1.*gate_proj"]
    assert main([*words, str(folder("toy-6b", "hf"))]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "gate_proj" in line]
    assert rows == [
        ["language_model.model.layers.1.mlp.gate_proj.weight", "float32", "96x48", "18,432"]
    ]
    assert main([*words, "--json", str(folder("toy-moe", "hf"))]) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert [each["name"].split(".")[-3] for each in tensors] == ["0", "1", "2", "3"]
    assert {each["module"] for each in tensors} == {"language_model experts"}
    assert main([*words, str(folder("toy-6b", "megatron"))]) == 2
    assert "no tensor of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["checkpoint", "inspect", "--match", "mlp1", str(folder("toy-6b", "hf"))])


def test_a_changed_number_is_measured(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "language_model.gpt.decoder.layers.1.self_attention.linear_qkv.weight"

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["language_model.model.layers.1.self_attn.k_proj.weight"][3, 5] += 0.5

    other = changed(folder("toy-6b", "hf"), tmp_path / "other", edit)
    (found,) = compared(folder("toy-6b", "internvl"), other).differences
    assert (found.name, found.kind) == (name, "values differ")
    fused = open_checkpoint(folder("toy-6b", "internvl")).weights[name].read()
    assert found.max_difference == pytest.approx(
        0.5, rel=1e-6
    )  # measured 3e-8: the sum is rounded to float32
    assert found.relative_norm == pytest.approx(
        0.5 / fused.double().norm().item(), rel=1e-6
    )  # measured 3e-8
    words = ["checkpoint", "inspect", str(folder("toy-6b", "megatron")), "--diff", str(other)]
    assert main([*words, "--match", "layers.1."]) == 1
    assert (
        f"values differ: 1 tensors\n  tensor{' ' * (len(name) - 6)}  max difference"
        in capsys.readouterr().out
    )
    assert main([*words, "--match", "layers.0."]) == 0
    assert main([*words, "--match", "no such"]) == 2
    capsys.readouterr()
    assert main([*words, "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert not shown["equal"]
    assert shown["differences"][-1]["name"] == name


def test_every_kind_of_difference(folder: Folder, tmp_path: Path) -> None:
    layer = "language_model.model.layers.0."

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["mlp2.1.weight"] = tensors["mlp2.1.weight"].bfloat16()
        tensors[layer + "mlp.down_proj.weight"] = tensors[layer + "mlp.down_proj.weight"][
            :, 1:
        ].contiguous()
        tensors[layer + "input_layernorm.weight"][0] = torch.nan
        tensors["mlp1.0.bias"].zero_()
        tensors["extra.weight"] = torch.ones(())
        del tensors[layer + "mlp.up_proj.weight"]

    other = changed(folder("toy-6b", "flash"), tmp_path / "other", edit)
    found = {each.name: each for each in compared(folder("toy-6b", "megatron"), other).differences}
    gpt = "language_model.gpt.decoder.layers.0."
    norm = "self_attention.linear_qkv.layer_norm_weight"
    assert {name: each.kind for name, each in found.items()} == {
        "encoder.connector_16x.linear_1.weight": "dtype differs",
        "encoder.connector_4x.norm.bias": "values differ",
        gpt + norm: "values differ",
        # What cannot be put together is compared under the file's own names.
        gpt + "mlp.linear_fc1.weight": "only in the first",
        layer + "mlp.gate_proj.weight": "only in the second",
        gpt + "mlp.linear_fc2.weight": "only in the first",
        layer + "mlp.down_proj.weight": "only in the second",
        "extra.weight": "only in the second",
    }
    rounded = found["encoder.connector_16x.linear_1.weight"]
    assert rounded.relative_norm is not None
    assert (
        0 < rounded.relative_norm < 2**-8
    )  # half a unit of bfloat16's last place; measured 0.0017
    assert rounded.first == "float32 [96, 640]"
    assert rounded.second == "bfloat16 [96, 640]"
    assert found["encoder.connector_4x.norm.bias"].relative_norm == 1.0
    assert str(found[gpt + norm].max_difference) == "nan"
    problems = "\n".join(open_checkpoint(other).problems)
    assert f"missing: {layer}mlp.up_proj.weight" in problems
    assert "unknown to the mapping table: extra.weight" in problems
    assert (
        f"misshapen: {layer}mlp.down_proj.weight has shape (48, 95), expected (48, 96)" in problems
    )
    # A NaN is equal to the same NaN, and 0 to 0.
    assert compared(other, other).differences == ()
    zero = {each.name: each for each in compared(other, folder("toy-6b", "flash")).differences}
    assert str(zero["encoder.connector_4x.norm.bias"].relative_norm) == "inf"
    assert (
        main(
            [
                "checkpoint",
                "inspect",
                str(other),
                "--diff",
                str(folder("toy-6b", "flash")),
                "--json",
            ]
        )
        == 1
    )


def test_shapes_of_two_sizes(folder: Folder) -> None:
    kinds = {
        each.name: each.kind
        for each in compared(folder("toy-moe", "hf"), folder("odd", "megatron")).differences
    }
    assert kinds["language_model.gpt.decoder.layers.2.mlp.router.weight"] == "shape differs"
    assert kinds["language_model.gpt.decoder.layers.2.mlp.experts.experts.3.linear_fc1.weight"] == (
        "only in the first"
    )


def test_one_pair_of_tensors_is_in_memory_at_a_time(folder: Folder) -> None:
    first, second = (
        open_checkpoint(folder("toy-moe", "flash")),
        open_checkpoint(folder("toy-moe", "megatron")),
    )
    alive, most = 0, 0

    def counted(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def read_and_count() -> Tensor:
            nonlocal alive, most
            tensor = read()
            alive += 1
            most = max(most, alive)
            weakref.finalize(tensor, lower)
            return tensor

        return read_and_count

    def lower() -> None:
        nonlocal alive
        alive -= 1

    spied = [
        replace(
            each,
            weights={name: replace(w, read=counted(w.read)) for name, w in each.weights.items()},
        )
        for each in (first, second)
    ]
    assert compare(*spied).differences == ()
    assert most == 2


def test_an_iteration_folder_and_steps(folder: Folder, tmp_path: Path) -> None:
    run = folder("toy-moe", "megatron")
    assert open_checkpoint(run / "iter_0000000").path == open_checkpoint(run, iteration=0).path
    with pytest.raises(CheckpointError, match="iter_0000007 is no finished checkpoint"):
        open_checkpoint(run, iteration=7)
    with pytest.raises(CheckpointError, match="has no steps"):
        open_checkpoint(folder("toy-moe", "hf"), iteration=0)
    with pytest.raises(CheckpointError, match="is of toy-moe, expected toy"):
        open_checkpoint(run, model_size="toy")
    with pytest.raises(CheckpointError, match="is no checkpoint: it has neither latest"):
        open_checkpoint(tmp_path)
    (tmp_path / "run.incomplete").mkdir()
    with pytest.raises(CheckpointError, match="never finished"):
        open_checkpoint(tmp_path / "run.incomplete")


def test_a_file_of_a_run_that_is_cut_short(folder: Folder, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder("toy-6b", "megatron"), run)
    file = next(run.glob("iter_*/*.distcp"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        CheckpointError, match=r"iter_0000000: \S+\.distcp cut short; copy the folder again"
    ):
        open_checkpoint(run)
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"iter_0000000 lacks \S+\.distcp, which its \.metadata names"
    ):
        open_checkpoint(run)
    file.write_bytes(whole)
    opened = open_checkpoint(run)
    file.write_bytes(whole[: len(whole) // 2])  # while it is read
    with pytest.raises(
        CheckpointError, match=r"could not read \S+ from .*iter_0000000: .*copy the folder again"
    ):
        compare(open_checkpoint(folder("toy-6b", "hf")), opened)
    (run / "iter_0000000/.metadata").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        open_checkpoint(run)
