"""What a run does not train is stored once, and is in every checkpoint; old ones are removed."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vico.checkpoint.integrity import CHECKSUMS, damage, write_checksums
from megatron_vico.checkpoint.retention import remove_superseded
from megatron_vico.checkpoint.run_folder import (
    finished_steps,
    iteration_folder,
    metadata_of,
    write_metadata,
)
from megatron_vico.config.registry import get_model_config
from megatron_vico.convert.megatron.reader import open_dcp
from megatron_vico.parallel.groups import Groups
from tests.checkpoint_runs import Training, make_training


def frozen_files(folder: Path) -> dict[str, int]:
    """By name, the number that the file system has for a file."""
    return {path.name: path.stat().st_ino for path in folder.glob("frozen_*")}


def assert_holds(folder: Path, training: Training) -> None:
    """By the reader of conversions, and by the checksums."""
    stored = open_dcp(folder)
    for name, tensor in training.tensors().items():
        assert torch.equal(stored.read_tensor(name)[: tensor.shape[0]], tensor), name
    assert damage(folder) == []


@pytest.mark.parametrize(("size", "frozen"), [("toy-6b", "encoder"), ("toy-moe", "language_model")])
def test_frozen_weights_are_written_once(
    size: str, frozen: str, groups: Groups, tmp_path: Path
) -> None:
    one, other = (make_training(size, groups=groups, seed=seed, frozen=frozen) for seed in (1, 2))
    saved: Path | None = None
    sizes = []
    for number in range(3):
        one.step(number)
        saved = one.save(tmp_path, number, earlier=saved)
        own = [path for path in saved.glob("*.distcp") if path.name not in frozen_files(saved)]
        sizes.append(sum(path.stat().st_size for path in own))
        assert_holds(saved, one)
    assert saved is not None
    first = tmp_path / "iter_0000000"
    assert frozen_files(first) == frozen_files(saved) != {}
    frozen_bytes = sum((saved / name).stat().st_size for name in frozen_files(saved))
    module = one.modules[frozen][0]
    assert frozen_bytes > sum(param.nbytes for param in module.parameters())
    assert max(sizes) - min(sizes) < 1000
    # The others stand by themselves.
    shutil.rmtree(first)
    moved = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}_moved"))
    assert other.load(moved) == {}
    for training in (one, other):
        training.step(3)
    expected = one.tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.tensors().items())
    again = other.save(moved, 3, earlier=moved / "iter_0000002")
    assert frozen_files(again) == frozen_files(moved / "iter_0000002")
    assert_holds(again, other)


def cannot_link(source: object, target: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("why", ["format", "other modules", "damage", "no links"])
def test_what_cannot_be_linked_is_written(
    why: str, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def training(**changes: str) -> Training:
        words = {"dtype": "fp32", "frozen": "encoder"} | changes
        made = make_training("toy-6b", groups=groups, seed=1, **words)
        made.step(0)
        return made

    changes = {"format": {"dtype": "bf16"}, "other modules": {"frozen": "language_model"}}
    one = training(**changes.get(why, {}))
    earlier = one.save(tmp_path / "a", 1)
    two = one if why in ("damage", "no links") else training()
    if why == "damage":
        os.truncate(next(earlier.glob("frozen_*")), 5)
    if why == "no links":
        monkeypatch.setattr(os, "link", cannot_link)
    saved = two.save(tmp_path / "b", 2, earlier=earlier)
    assert frozen_files(saved)
    assert not set(frozen_files(saved).values()) & set(frozen_files(earlier).values())
    assert_holds(saved, two)


def checkpoints(root: Path, steps: range) -> None:
    """Finished ones without tensors."""
    for step in steps:
        folder = iteration_folder(root, step)
        folder.mkdir(parents=True)
        write_metadata(folder, metadata_of(get_model_config("toy"), stage="warmup"))
        (folder / "weights").write_text("weights")
        write_checksums(folder)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (None, None, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (2, None, [3, 5, 7, 8, 9]),
        (None, 3, [3, 5, 6, 8, 9]),
        (2, 4, [3, 4, 5, 7, 8, 9]),
        (20, None, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_superseded_checkpoints_are_removed(
    keep_last: int | None, keep_every: int | None, left: list[int], tmp_path: Path
) -> None:
    """Eight has just been saved; 9 is of a run that was set back, 5 is cut, 3 has no checksums."""
    checkpoints(tmp_path, range(1, 10))
    os.truncate(tmp_path / "iter_0000005" / "weights", 3)
    (tmp_path / "iter_0000003" / CHECKSUMS).unlink()
    (tmp_path / "iter_0000002.incomplete").mkdir()
    remove_superseded(tmp_path, newest=8, keep_last=keep_last, keep_every=keep_every)
    assert finished_steps(tmp_path) == left


def test_nothing_is_removed_for_a_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    checkpoints(tmp_path, range(1, 4))
    os.truncate(tmp_path / "iter_0000003" / "weights", 3)
    remove_superseded(tmp_path, newest=3, keep_last=1, keep_every=None)
    assert finished_steps(tmp_path) == [1, 2, 3]
