"""What a folder looks like, to see that a refused command has changed nothing."""

from pathlib import Path


def state_of(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Mode, size and time of the last change of all that is in a folder, and of itself."""
    found = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {path: (each.st_mode, each.st_size, each.st_mtime_ns) for path, each in found.items()}
