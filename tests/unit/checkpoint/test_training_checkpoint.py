"""Training checkpoints in one process: resume is exact, a bad one is refused, a failed save harms
nothing."""

import errno
import os
from pathlib import Path

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_vico.checkpoint.integrity import CHECKSUMS
from megatron_vico.checkpoint.run_folder import (
    CheckpointMetadata,
    has_checkpoint,
    iteration_folder,
    latest_iteration,
    read_metadata,
)
from megatron_vico.checkpoint.training_checkpoint import load_weights, save_checkpoint
from megatron_vico.errors import CheckpointError
from megatron_vico.files import read_json, write_json
from megatron_vico.parallel.groups import Groups
from tests.checkpoint_runs import Training, make_training

LATEST = "latest_checkpointed_iteration.txt"


def unchecked(folder: Path) -> Path:
    """As it was saved before there were checksums."""
    (folder / CHECKSUMS).unlink()
    return folder


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def assert_same(one: Training, other: Training) -> None:
    """Weights, bit for bit."""
    expected = other.tensors()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("optimizer", ["replicated", "sharded"])
@pytest.mark.parametrize(
    ("size", "dtype"), [("toy-6b", "fp32"), ("toy-moe", "fp32"), ("toy-moe", "bf16")]
)
def test_resume_is_exact(
    size: str, dtype: str, optimizer: str, groups: Groups, tmp_path: Path
) -> None:
    one = make_training(size, groups=groups, seed=1, dtype=dtype, optimizer=optimizer)
    for number in range(2):
        one.step(number)
    one.save(tmp_path, 2, {"iteration": 2, "window": torch.arange(3.0), "nested": [{"seed": 7}]})
    other = make_training(size, groups=groups, seed=2, dtype=dtype, optimizer=optimizer)
    found = other.load(tmp_path)
    assert found["iteration"] == 2
    assert torch.equal(found["window"], torch.arange(3.0))
    assert found["nested"] == [{"seed": 7}]
    assert_same(one, other)
    for number in range(2, 5):  # moments, master weights, step counts and learning rate show here
        one.step(number)
        other.step(number)
    assert_same(one, other)
    rates = [[group["lr"] for group in each.optimizer.param_groups] for each in (one, other)]
    assert rates[0] == rates[1]


def test_modules_alone_or_whole_can_be_loaded(groups: Groups, tmp_path: Path) -> None:
    """Also a module instead of its chunks."""
    one, other = (make_training("toy-6b", groups=groups, seed=seed) for seed in (1, 2))
    one.save(tmp_path, 1)
    before = other.tensors()
    whole = {name: chunks[0] for name, chunks in other.modules.items()}
    load_weights(tmp_path, modules={"encoder": whole["encoder"]}, model_size="toy-6b")
    for name, tensor in other.tensors().items():
        expected = one.tensors() if name.startswith("encoder.") else before
        assert torch.equal(tensor, expected[name]), name
    load_weights(tmp_path, modules=whole, model_size="toy-6b")
    assert_same(one, other)


@pytest.mark.slow
def test_a_step_can_be_chosen_and_written_again(groups: Groups, tmp_path: Path) -> None:
    one, other = (make_training("toy-6b", groups=groups, seed=seed) for seed in (1, 2))
    assert not has_checkpoint(tmp_path)
    one.step(0)
    first = one.tensors()
    processes = psutil.Process().children()
    folder = one.save(tmp_path, 1)
    assert psutil.Process().children() == processes, "megatron-core would leave one behind"
    assert has_checkpoint(tmp_path)
    assert folder == tmp_path / "iter_0000001"
    assert (folder / "config.yaml").read_text() == "a: 1\n"
    assert read_metadata(tmp_path) == CheckpointMetadata(
        model_size="toy-6b",
        stage="consistency",
        has_optimizer=True,
        iteration=1,
        layout="1 rank",
        optimizer="replicated",
    )
    one.step(1)
    one.save(tmp_path, 2)
    assert (tmp_path / LATEST).read_text() == "2\n"
    other.load(tmp_path, 1)
    assert all(torch.equal(tensor, first[name]) for name, tensor in other.tensors().items())
    other.load(tmp_path)
    assert_same(one, other)
    one.step(2)
    one.save(tmp_path, 2)
    other.load(tmp_path)
    assert_same(one, other)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["iter_0000001", "iter_0000002", LATEST]


def test_another_optimizer_cannot_resume(groups: Groups, tmp_path: Path) -> None:
    one = make_training("toy-6b", groups=groups, seed=1)
    weights = CheckpointMetadata(model_size="toy-6b", stage="converted")
    save_checkpoint(iteration_folder(tmp_path, 0), modules=one.modules, metadata=weights)
    with pytest.raises(CheckpointError, match="holds weights only"):
        one.load(tmp_path)
    sharded = "of a distributed optimizer, this run's is replicated"
    for number, (kind, message) in enumerate(
        (({"frozen": "encoder"}, "lacks optimizer"), ({"optimizer": "sharded"}, sharded)), start=1
    ):
        other = make_training("toy-6b", groups=groups, seed=1, **kind)
        other.step(0)
        other.save(tmp_path, number)
        with pytest.raises(CheckpointError, match=message):
            one.load(tmp_path)
    # As it was written before the optimizer was noted: its tensors tell.
    one.step(0)
    path = unchecked(one.save(tmp_path, 3)) / "checkpoint.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key != "optimizer"})
    one.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks optimizer\.state\.param"):
        other.load(tmp_path)


def test_another_size_is_refused(groups: Groups, tmp_path: Path) -> None:
    folder = unchecked(make_training("toy-6b", groups=groups, seed=1).save(tmp_path, 1))
    other = make_training("toy-moe", groups=groups, seed=1)
    with pytest.raises(CheckpointError, match="is of toy-6b, this run is of toy-moe"):
        other.load(tmp_path)
    path = folder / "checkpoint.json"
    # Whatever the metadata says, the tensors are compared.
    for size, names, message in (
        ("toy-moe", None, r"it lacks .*qkv\.bias.* has, beyond the model, .*q_layernorm\.weight"),
        ("toy", None, r"it lacks .*linear_qkv\.bias"),
        ("toy", "language_model", r"linear_qkv\.layer_norm_weight is \(4, 48\), .* \(3, 128\)"),
    ):
        write_json(path, read_json(path) | {"model_size": size})
        modules = make_training(size, groups=groups, seed=1).modules
        chosen = {name: modules[name] for name in modules if names in (None, name)}
        with pytest.raises(CheckpointError, match=message):
            load_weights(tmp_path, modules=chosen, model_size=size)


def test_what_is_no_checkpoint(groups: Groups, tmp_path: Path) -> None:
    one = make_training("toy-6b", groups=groups, seed=1)
    with pytest.raises(CheckpointError, match="no such folder"):
        one.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        one.load(tmp_path)
    one.step(0)
    folder = one.save(tmp_path, 3)
    with pytest.raises(
        CheckpointError,
        match=r"iter_0000004 is no finished checkpoint; finished here: iter_0000003\.",
    ):
        one.load(tmp_path, 4)
    unchecked(folder)
    for file in folder.glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"could not read .*iter_0000003"):
        one.load(tmp_path)
    (folder / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        one.load(tmp_path)
    (tmp_path / LATEST).write_text("release")
    with pytest.raises(
        CheckpointError, match=r"holds 'release', expected a step.*`echo 3 > .*newest"
    ):
        one.load(tmp_path)
    (tmp_path / LATEST).unlink()
    message = r"finished checkpoints \(iter_0000003\) but no latest.*`echo 3 > .*/latest_\w+\.txt`"
    for look in (has_checkpoint, latest_iteration, one.load):
        with pytest.raises(CheckpointError, match=message):
            look(tmp_path)


def test_a_flipped_bit_is_found(
    groups: Groups, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_training("toy-6b", groups=groups, seed=1)
    folders = []
    for number in range(1, 5):
        one.step(number)
        folders.append(one.save(tmp_path, number))
    before = one.tensors()
    for name in (".metadata", "config.yaml", "metadata.json"):
        whole = (folders[3] / name).read_bytes()
        flip(folders[3] / name)
        with pytest.raises(CheckpointError, match=rf"04 is damaged: {name} differs from its check"):
            one.load(tmp_path)
        (folders[3] / name).write_bytes(whole)
    flip(next(folders[3].glob("*.distcp")))
    unchecked(folders[2])  # not known to be intact
    next(folders[1].glob("*.distcp")).unlink()
    message = (
        r"iter_0000004 is damaged: __0_\d+\.distcp differs from its checksum; the newest intact"
        r" checkpoint is \S+iter_0000001; to go on from it, `echo 1 > \S+/latest_\w+\.txt`"
    )
    with pytest.raises(CheckpointError, match=message):
        one.load(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.tensors().items())
    with pytest.raises(CheckpointError, match=r"02 is damaged: __0_\d+\.distcp is absent;"):
        load_weights(tmp_path, modules=one.modules, model_size="toy-6b", iteration=2)
    (folders[0] / CHECKSUMS).write_text("{}")
    with pytest.raises(CheckpointError, match=r"checksums\.json is no table of files"):
        one.load(tmp_path, 1)
    capsys.readouterr()
    one.load(tmp_path, 3)
    assert "iter_0000003 was saved without checksums" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["tensors", "index", "rename"])
def test_full_disk_leaves_the_last_good_checkpoint(
    where: str, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (make_training("toy-6b", groups=groups, seed=seed) for seed in (1, 2))
    one.step(0)
    one.save(tmp_path, 1, {"iteration": 1})
    good = one.tensors()
    one.step(1)

    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = {
        "tensors": (filesystem_async, "_write_item"),
        "index": (filesystem_async.FileSystemWriterAsync, "finish"),
        "rename": (os, "rename"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, no_space)
        with pytest.raises(
            CheckpointError, match=r"iter_0000002: .* GB are free .* last good .*iter_0000001"
        ):
            one.save(tmp_path, 2)
    assert latest_iteration(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", LATEST]
    assert other.load(tmp_path) == {"iteration": 1}
    assert all(torch.equal(tensor, good[name]) for name, tensor in other.tensors().items())
    one.save(tmp_path, 2)  # the run goes on once there is space
    assert latest_iteration(tmp_path) == 2


def test_save_that_was_killed_is_no_checkpoint(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_training("toy-6b", groups=groups, seed=1)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
        one.save(tmp_path / "file", 1)
    one.save(tmp_path, 1)

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(filesystem_async.FileSystemWriterAsync, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            one.save(tmp_path, 2)
    assert (tmp_path / "iter_0000002.incomplete").is_dir()
    assert latest_iteration(tmp_path) == 1
    with pytest.raises(CheckpointError, match=r"finished here: iter_0000001\."):
        one.load(tmp_path, 2)
    one.save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
