"""`vico shards inspect | verify`: what is in shards, as text and pictures, and what is wrong."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg, create_mutex_group

from megatron_vico.cli.command_line import refuse_less
from megatron_vico.config.config_json import model_named
from megatron_vico.config.registry import MODELS
from megatron_vico.config.schema import DataOptions, TrainingOptions
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import PICTURES, refuse_unwritable
from megatron_vico.shard_tools.options import usable_cpus

if TYPE_CHECKING:
    from megatron_vico.data.pack.packing import PackLimits
    from megatron_vico.data.pack.plan import FolderList
    from megatron_vico.data.shards.mixture import MixedFolder
    from megatron_vico.shard_tools.contact_sheet import ViewedSample
    from megatron_vico.shard_tools.shard_check import Problem


_FIRST = create_mutex_group(required=False)


@dataclass(frozen=True, kw_only=True)
class _Folders:
    """Which shards, and how they would be packed."""

    folder: Positional[str]
    """A folder of shards, or a mixture.json."""

    tokenizer_model: str | None = None
    """Tokenizer folder, or SentencePiece .model; encodes the samples."""

    model_size: str | None = None
    """Gives the tokens of a tile; unset, those that all models of its size have."""

    seq_length: int = DataOptions.seq_length
    """Most tokens in a pack."""

    max_tiles_per_pack: int = DataOptions.max_tiles_per_pack
    """Most tiles in a pack."""

    max_samples_per_pack: int | None = DataOptions.max_samples_per_pack
    """Most samples in a pack; unset, as many as fit."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: if no sample fits in a pack."""
        refuse_less(self, seq_length=1, max_tiles_per_pack=1, max_samples_per_pack=1)

    def limits(self) -> "PackLimits":
        """Of a pack."""
        from megatron_vico.data.pack.packing import PackLimits

        return PackLimits(
            capacity=self.seq_length,
            max_tiles=self.max_tiles_per_pack,
            max_samples=self.max_samples_per_pack,
        )


@dataclass(frozen=True, kw_only=True)
class Inspect(_Folders):
    """Show samples and statistics."""

    samples: int = 1
    """How many samples to show."""

    start: Annotated[int, _FIRST] = 0
    """Number of the first sample to show."""

    key: Annotated[str | None, _FIRST] = None
    """Key of the first sample to show."""

    picture: Annotated[Path | None, arg(metavar="FILE.png")] = None
    """Draw the samples that are shown."""

    plots: Annotated[Path | None, arg(metavar="DIR")] = None
    """Draw the statistics as DIR/shards.png."""

    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the statistics."""

    packing_window: int = DataOptions.packing_window
    """Samples of the global order that are packed together."""

    data_url_schemes: tuple[str, ...] = ()
    """Schemes of URLs that a mixture file may name besides those of common storage (s3, gs, https
    and others)."""

    seed: int = TrainingOptions.seed
    """Of the order that is packed."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a number admits nothing, or a file could not be written."""
        super().__post_init__()
        refuse_less(self, samples=0, start=0, packing_window=1)
        refuse_unwritable("--picture", self.picture, endings=PICTURES)
        refuse_unwritable("--json", self.json)
        if self.plots is not None and self.plots.exists() and not self.plots.is_dir():
            raise ConfigError(f"--plots {self.plots}: a file, expected a folder to make.")

    def run(self) -> None:
        """Print samples and statistics, and draw them where that is asked for.

        Raises:
            ConfigError: if a folder holds no shards, or a flag does not fit it.
            SampleError: if a shard or a sample is broken.
        """
        from megatron_vico.data.pack.plan import FolderList
        from megatron_vico.data.shards.mixture import read_mixture
        from megatron_vico.data.shards.reader import ShardFolder
        from megatron_vico.files import write_json
        from megatron_vico.shard_tools.report import PackingOptions, ShardStatistics

        options = DataOptions(data_url_schemes=self.data_url_schemes)
        mixture = read_mixture([self.folder], options=options)
        folders = [ShardFolder.open(each.path, options=options) for each in mixture]
        repeats = [each.repeat for each in mixture]
        for folder, repeat in zip(folders, repeats, strict=True):
            counts = f"{len(folder):,} samples in {len(folder.index.shards)} shards"
            print(f"{folder.path}: {counts}, repeat {repeat:g}")
            print(f"  tokenizer {folder.index.tokenizer}, {folder.index.settings}")
            for message in folder.index.skipped:
                print(f"  left out: {message}")
        tokens_kept = _tokens_kept(self.model_size, folders[0].index.settings.image_size)
        packing = None
        if tokens_kept is None:
            print("packs are not counted: the tokens of a tile are not known; give --model-size.")
        else:
            packing = PackingOptions(
                limits=self.limits(),
                window=self.packing_window,
                tokens_kept=tokens_kept,
                seed=self.seed,
            )
        statistics = ShardStatistics.of(folders, repeats=repeats, packing=packing)
        print(f"\n{statistics.as_text()}")
        if self.json is not None:
            write_json(self.json, statistics.as_json(), sort_keys=False)
        shown = _show(FolderList(folders), self)
        if self.plots is not None:
            from megatron_vico.shard_tools.plots import shard_figure

            self.plots.mkdir(parents=True, exist_ok=True)
            title = f"{Path(self.folder).name}: {len(statistics.num_tokens):,} samples"
            shard_figure(statistics, title=title).savefig(self.plots / "shards.png", dpi=110)
            print(self.plots / "shards.png")
        if self.picture is not None:
            from megatron_vico.shard_tools.contact_sheet import contact_sheet

            if not shown:
                raise ConfigError("--picture: no samples to draw; give --samples above 0.")
            contact_sheet(shown)[0].save(self.picture)
            print(self.picture)


@dataclass(frozen=True, kw_only=True)
class Verify(_Folders):
    """Read everything once and say what is wrong.

    Exit status: 0 if nothing is wrong, 1 if something is, 2 after an error.
    """

    workers: int = field(default_factory=usable_cpus)
    """Processes; 0, none but this one."""

    sample_share: float = 1.0
    """Share of the samples that are decoded; all are hashed."""

    def run(self) -> int:
        """Print a line for each problem and a table of causes.

        Returns:
            0, or 1 where there is a problem.
        """
        from tqdm import tqdm

        from megatron_vico.data.encode.tokenizer import load_tokenizer
        from megatron_vico.data.shards.mixture import read_mixture
        from megatron_vico.data.shards.storage import is_url
        from megatron_vico.shard_tools.shard_check import Problem, VerifyOptions
        from megatron_vico.shard_tools.verify import Verification

        folders = read_mixture([self.folder])
        for folder in folders:
            if is_url(folder.path):
                raise ConfigError(
                    f"{folder.path}: only local folders are verified; copy it, or verify it where"
                    " it lies."
                )
        tokens_kept = _tokens_kept(self.model_size, _image_size(folders))
        how = VerifyOptions(
            tokenizer=None
            if self.tokenizer_model is None
            else load_tokenizer(self.tokenizer_model),
            limits=self.limits() if tokens_kept else None,
            tokens_kept=tokens_kept or 0,
            sample_share=self.sample_share,
            num_workers=self.workers,
        )
        verification = Verification([Path(folder.path) for folder in folders], how)
        problems: list[Problem] = []
        num_samples = 0
        # Drawn on a terminal only, and not for what takes less than a second.
        total = verification.num_bytes
        with tqdm(
            total=total, unit="B", unit_scale=True, disable=None, delay=1, file=sys.stderr
        ) as bar:
            for found in verification:
                if isinstance(found, Problem):
                    bar.write(str(found), file=sys.stdout)
                    problems.append(found)
                else:
                    num_samples += found.num_samples
                    bar.update(found.num_bytes)
        size = f"{verification.num_shards} shards, {verification.num_bytes:,} bytes"
        done = f"{num_samples:,} samples decoded: {len(problems)} problems"
        print(f"{self.folder}: {len(folders)} folders, {size}, {done}")
        if problems:
            print(_causes(problems))
        return 1 if problems else 0


def _show(data: "FolderList", options: Inspect) -> list["ViewedSample"]:
    """Print the samples that are asked for."""
    from megatron_vico.data.encode.sample_encoder import SampleEncoder
    from megatron_vico.data.encode.tokenizer import load_tokenizer
    from megatron_vico.shard_tools import sample_view

    start = options.start if options.key is None else _number_of(options.key, data)
    if not 0 <= start < len(data):
        raise ConfigError(f"--start {start}: expected a number from 0 to {len(data) - 1}.")
    tokenizer = None if options.tokenizer_model is None else load_tokenizer(options.tokenizer_model)
    shown: list[ViewedSample] = []
    for number in range(start, min(start + options.samples, len(data))):
        folder, local = data.locate(number)
        sample, known, settings = folder.read(local), folder.describe(local), folder.index.settings
        tiles = known.tiles_per_image
        pairs = zip(sample.images, tiles, strict=True)
        images = [sample_view.view_image(image, count, settings) for image, count in pairs]
        shown.append((sample, images))
        counts = f"{known.num_tokens} tokens, {known.num_responses} trained, {sum(tiles)} tiles"
        print(f"\n{number}: {repr(sample.key)[1:-1]} ({counts})")
        for line in sample_view.image_lines(images):
            print(f"  {line}")
        if tokenizer is None:
            text = "\n".join(sample_view.turn_lines(sample))
        else:
            folder.check_encoding(tokenizer=tokenizer, settings=settings)
            encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
            text = sample_view.token_text(sample, encoder=encoder).rstrip()
        print(indent(text, "  "))
    if shown:
        print(f"\n{'...'.join(sample_view.TRAINED)}: trained")
    return shown


def _number_of(key: str, data: "FolderList") -> int:
    start = 0
    for folder in data.folders:
        number = folder.find(key)
        if number is not None:
            return start + number
        start += len(folder)
    folders = ", ".join(str(folder.path) for folder in data.folders)
    raise ConfigError(f"--key {key}: no such sample in {folders}.")


def _causes(problems: Sequence["Problem"]) -> str:
    """The table of causes, the most frequent first."""
    counts = Counter(problem.cause for problem in problems)
    width = max(map(len, counts))
    lines = [f"\n{'cause':{width}}  problems  samples  files"]
    for cause, count in counts.most_common():
        same = [problem for problem in problems if problem.cause == cause]
        num_samples = sum(problem.num_samples for problem in same)
        num_files = len({(problem.folder, problem.file) for problem in same})
        lines.append(f"{cause:{width}}  {count:8}  {num_samples:7}  {num_files:5}")
    return "\n".join(lines)


def _tokens_kept(model_size: str | None, image_size: int | None) -> int | None:
    """Visual tokens of a tile that is not compressed; None where that is not known."""
    if model_size is not None:
        return model_named(model_size).visual_tokens_per_tile
    known = {
        model.visual_tokens_per_tile
        for model in MODELS.values()
        if model.vision.image_size == image_size
    }
    return known.pop() if len(known) == 1 else None


def _image_size(folders: Sequence["MixedFolder"]) -> int | None:
    """Side of the tiles of the first folder that has an index."""
    from megatron_vico.data.shards.index import FolderIndex

    for folder in folders:
        try:
            return FolderIndex.read(Path(folder.path)).settings.image_size
        except (ConfigError, SampleError):
            continue  # `verify` says what is wrong with it
    return None
