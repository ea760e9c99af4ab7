"""A folder that is being written: it appears when it is whole, and takes the place of nothing."""

import errno
from pathlib import Path

import pytest

from megatron_vico.convert.output_folder import new_folder
from megatron_vico.errors import CheckpointError
from megatron_vico.files import refuse_incomplete


def write(path: str | Path, *, error: BaseException | None = None) -> None:
    with new_folder(path) as folder:
        (folder / "file").write_text("x")
        if error is not None:
            raise error


def test_it_appears_when_it_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "export"
    with new_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
        with pytest.raises(CheckpointError, match="never finished"):
            refuse_incomplete(folder)
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_it_never_replaces_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        write(tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "volume").mkdir()
    # The kernel would refuse the renaming, after all has been written.
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "volume")
    with pytest.raises(CheckpointError, match="is a mount point"):
        write(tmp_path / "volume")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "volume"}


def test_where_a_link_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To another disk, most often: the unfinished folder has to be there too."""
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    with new_folder(tmp_path / "link") as folder:
        assert folder.parent == real.parent
        (folder / "file").write_text("x")
    assert (real / "file").read_text() == "x"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(".")  # which has no name of its own
    assert (tmp_path / "here" / "file").read_text() == "x"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failed_writer_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write(tmp_path / "export", error=error)
    assert not list(tmp_path.iterdir())


def test_a_writer_that_was_killed_can_start_over(tmp_path: Path) -> None:
    left = tmp_path / "export.incomplete"
    left.mkdir()
    (left / "half").write_text("")
    write(tmp_path / "export")
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["file"]
    assert not left.exists()
