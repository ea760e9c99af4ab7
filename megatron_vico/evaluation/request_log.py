"""The server's request log: one JSON object a line, of which tables take what was compressed.

Keys that are read here: `id` (X-Request-Id, else the server's own), `time` (Unix seconds), `model`
(with the suffix of its plan: internvl@vir), `plan`, `status` (of HTTP), `prompt_tokens`, `tiles`,
`compressed_tiles`, `visual_tokens` and `images` (a list with `tiles` and `compressed_tiles` each).
"""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vico.errors import ConfigError
from megatron_vico.files import read_json_lines

_COUNTS = ("prompt_tokens", "tiles", "compressed_tiles", "visual_tokens")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answered request."""

    id: str
    time: float
    plan: str
    prompt_tokens: int
    tiles: int
    compressed_tiles: int
    visual_tokens: int
    images: tuple[tuple[int, int], ...]
    """Tiles and compressed tiles of each image."""


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What the requests of a benchmark come to."""

    plan: str
    num_requests: int
    tiles: int
    compressed_tiles: int
    visual_tokens: int
    by_image: float
    """Mean over images of the share of their tiles that is compressed."""

    @property
    def by_tile(self) -> float:
        """Compressed tiles over all tiles: the paper's ratio of compressed patches."""
        return self.compressed_tiles / self.tiles if self.tiles else 0.0


class RequestLogs:
    """Answered requests of one or more logs, by model."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read them; ConfigError if one cannot be read or lacks a key."""
        self.paths = tuple(paths)
        by_model: dict[str, list[Request]] = defaultdict(list)
        for path in paths:
            try:
                rows, _ = read_json_lines(path)  # half a last line: the server was killed
            except OSError as error:
                raise ConfigError(
                    f"{path}: {error.strerror}; give the file of `vico serve --request-log`."
                ) from error
            for row in rows:
                if row.get("status") == 200:
                    by_model[str(row.get("model"))].append(_request(row, path))
        self._by_model = {
            model: sorted(requests, key=lambda each: each.time)
            for model, requests in by_model.items()
        }

    @property
    def models(self) -> list[str]:
        """Names that were asked for."""
        return sorted(self._by_model)

    def named(self, model: str, tasks: Iterable[str]) -> list[Request]:
        """Requests whose id begins with one of `tasks` and a slash; of equal ids, the last."""
        heads = tuple(f"{task}/" for task in tasks)
        found = [each for each in self._by_model.get(model, ()) if each.id.startswith(heads)]
        return list({each.id: each for each in found}.values())

    def between(self, model: str, windows: Iterable[tuple[float, float]]) -> list[Request]:
        """Requests inside any of the windows of time, Unix seconds."""
        requests = self._by_model.get(model, [])
        inside: dict[int, Request] = {}
        for start, end in windows:
            first = bisect.bisect_left(requests, start, key=lambda each: each.time)
            last = bisect.bisect_right(requests, end, key=lambda each: each.time)
            inside |= dict(enumerate(requests[first:last], first))
        return list(inside.values())

    def all_of(self, model: str) -> list[Request]:
        """Every answered request for a model."""
        return list(self._by_model.get(model, ()))


def compression_of(requests: Sequence[Request]) -> Compression:
    """Sums and means; text-only requests count as requests, with no tile."""
    shares = [done / tiles for each in requests for tiles, done in each.images if tiles]
    return Compression(
        plan="/".join(sorted({each.plan for each in requests})),
        num_requests=len(requests),
        tiles=sum(each.tiles for each in requests),
        compressed_tiles=sum(each.compressed_tiles for each in requests),
        visual_tokens=sum(each.visual_tokens for each in requests),
        by_image=sum(shares) / len(shares) if shares else 0.0,
    )


def _request(row: dict[str, Any], path: Path) -> Request:
    try:
        return Request(
            id=str(row["id"]),
            time=float(row["time"]),
            plan=str(row["plan"]),
            images=tuple(
                (int(each["tiles"]), int(each["compressed_tiles"])) for each in row["images"]
            ),
            **{name: int(row[name]) for name in _COUNTS},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: request {row.get('id')!r} has no usable {error}; expected the keys of `vico"
            " serve --request-log`."
        ) from error
