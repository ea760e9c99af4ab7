"""Checkpoints from one form to another, a tensor at a time.

A conversion holds one tensor and what is made of it, whatever the model's size. Processes that
torchrun has started share it. Its output has another name until it is whole; a conversion that was
interrupted starts over.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_vico import files
from megatron_vico.checkpoint import run_folder
from megatron_vico.checkpoint.integrity import WEIGHTS, crc32, intact_meanwhile, write_checksums
from megatron_vico.checkpoint.ranks import FAILURES, Ranks, launched
from megatron_vico.convert.huggingface.config import ExportOptions
from megatron_vico.convert.huggingface.export import (
    carry_companions,
    check_companions,
    shards_of,
    write_companions,
    write_weights,
)
from megatron_vico.convert.initial import CONNECTOR_16X_AND_VIR
from megatron_vico.convert.megatron.writer import check_formats, sizes_of, write_dcp
from megatron_vico.convert.open import TOKENIZER_FOLDER, is_megatron, open_source
from megatron_vico.convert.options import ConversionOptions, Layout
from megatron_vico.convert.output_folder import check_space, new_folder
from megatron_vico.convert.source import Source, bytes_of, cast, check_whole, completed, same_bits
from megatron_vico.convert.stated import stated_options
from megatron_vico.data.encode.tokenizer import Tokenizer, load_tokenizer
from megatron_vico.errors import CheckpointError, ConfigError, cause_of, listed
from megatron_vico.models.build import padded_vocab_size

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(
    source: str | Path | Source,
    *,
    output: str | Path,
    layout: Layout | Literal["megatron"],
    export: ExportOptions | None = None,
    options: ConversionOptions | None = None,
) -> Path:
    """Convert a checkpoint between Megatron's form and Hugging Face's, or two layouts of those.

    Called by every process that torchrun started; torch.distributed need not run yet.

    Args:
        source: a run's folder (megatron-core's form) or a Hugging Face folder; which one is found
            from its files. Or a source, such as of two folders combined. What it lacks of
            connectors and ViR gets initial values on the way to Megatron's form.
        output: where to, and what is returned; must not exist, or be empty.
        export: what exported config files say; unset, what the input's say.

    Raises:
        CheckpointError: on all processes, if the source is broken, of another size, or has no
            tensors for parts of the output's layout; if the output cannot be written, or differs
            from the input.
    """
    output, chosen = Path(output), options or ConversionOptions()
    if not isinstance(source, Source):
        _refuse_overlap(Path(source).resolve(), output.resolve())
    _refuse_without_effect(layout, chosen, export)
    # Before the weights: a wrong path is not to be found out hours later.
    tokenizer = (
        load_tokenizer(chosen.tokenizer_model) if chosen.tokenizer_model is not None else None
    )
    with launched() as ranks:
        opened = ranks.agree(lambda: _opened(source, layout, chosen))
        intact: AbstractContextManager[None] = nullcontext()
        if opened.contents is not None:
            weights = "*" if opened.layout is None else WEIGHTS
            intact = intact_meanwhile(opened.contents.path, ranks=ranks, files=weights)
        sums: dict[str, str] = {}
        if chosen.verify:
            opened = _summed(opened, sums)
        said = export or ExportOptions()
        if export is None and layout != "megatron" and not isinstance(source, Source):
            folder = Path(source)
            said = ranks.agree(lambda: stated_options(folder, iteration=chosen.ckpt_step))
        with new_folder(output, ranks=ranks) as folder, intact:
            if layout == "megatron":
                _write_megatron(folder, opened, tokenizer=tokenizer, options=chosen, ranks=ranks)
            else:
                write_hf(
                    folder,
                    opened,
                    layout=layout,
                    tokenizer=tokenizer,
                    export=said,
                    options=chosen,
                    ranks=ranks,
                )
        if chosen.verify:
            _verify(output, opened, sums, options=chosen, ranks=ranks)
    return output


def _refuse_overlap(source: Path, output: Path) -> None:
    # What is at the unfinished folder's path is removed.
    if source in (output, *output.parents) or files.unfinished_path(output) in (
        source,
        *source.parents,
    ):
        raise CheckpointError(
            f"the output {output} is the input {source}, or within it, or would take its place"
            " while it is written; the input is never touched, so name another folder."
        )


def _refuse_without_effect(
    layout: Layout | Literal["megatron"], options: ConversionOptions, export: ExportOptions | None
) -> None:
    if layout == "megatron" and export is not None:
        raise ConfigError(
            "what an exported config says has no effect on a Megatron checkpoint; give it when"
            " exporting."
        )
    if layout != "megatron" and options.tensor_model_parallel_size != 1:
        raise ConfigError(
            "--tensor-model-parallel-size pads the vocabulary of a Megatron checkpoint; a Hugging"
            " Face folder has none of that padding, so leave it out."
        )


def _opened(
    source: str | Path | Source, layout: Layout | Literal["megatron"], options: ConversionOptions
) -> Source:
    if not isinstance(source, Source):
        folder = Path(source)
        if layout == "megatron" and is_megatron(folder):
            raise CheckpointError(
                f"{folder} is a Megatron checkpoint already; name a layout: internvl, hf or flash."
            )
        source = open_source(
            folder,
            model_size=options.model_size,
            layout=options.input_layout,
            iteration=options.ckpt_step,
        )
    source = check_whole(source)
    if source.companions is not None:
        check_companions(source.companions)
    if layout == "megatron":
        source = completed(source, seed=options.seed)
    elif layout == "flash" and not any(
        name.startswith(CONNECTOR_16X_AND_VIR) for name in source.tensors
    ):
        raise CheckpointError(
            f"{source.where} has no connector_16x and no ViR, so it is no Flash model yet; convert"
            " it to Megatron's form, train it, and export that."
        )
    if options.dtype is not None:
        source = cast(source, _DTYPES[options.dtype])
    if layout == "megatron":
        check_formats(source)
    return source


def write_hf(
    folder: Path,
    source: Source,
    *,
    layout: Layout,
    tokenizer: Tokenizer | None,
    export: ExportOptions,
    options: ConversionOptions,
    ranks: Ranks,
) -> None:
    """Write a Hugging Face folder; called by every rank of `ranks`."""
    shards = ranks.agree(lambda: shards_of(source, layout, max_shard_bytes=options.max_shard_bytes))
    sizes = [shard.num_bytes for shard in shards]
    ranks.on_main(lambda: check_space(folder, sum(sizes)))
    with _progress("writing", sizes, options=options, ranks=ranks) as written:
        known = write_weights(
            folder, source, layout=layout, shards=shards, ranks=ranks, written=written
        )
    ranks.on_main(
        lambda: write_companions(folder, source, layout=layout, options=export, tokenizer=tokenizer)
    )
    write_checksums(folder, ranks=ranks, known=known)


def _write_megatron(
    folder: Path,
    source: Source,
    *,
    tokenizer: Tokenizer | None,
    options: ConversionOptions,
    ranks: Ranks,
) -> None:
    target = run_folder.iteration_folder(folder, 0)
    padded = padded_vocab_size(source.model.language.vocab_size, options.tensor_model_parallel_size)
    sizes = sizes_of(source, padded_vocab_size=padded)
    ranks.on_main(lambda: check_space(folder, sum(sizes)))
    ranks.on_main(target.mkdir)
    with _progress("writing", sizes, options=options, ranks=ranks) as written:
        known = write_dcp(
            target,
            source,
            padded_vocab_size=padded,
            ranks=ranks,
            written=written,
            max_file_bytes=options.max_shard_bytes,
        )

    def finish() -> None:
        if source.companions is not None:
            carry_companions(source.companions, folder / TOKENIZER_FOLDER, tokenizer=tokenizer)
        metadata = run_folder.metadata_of(
            source.model, stage="converted", layout="1 rank", trained=source.trained
        )
        run_folder.write_metadata(target, metadata)
        run_folder.point_to(folder, 0)

    ranks.on_main(finish)
    write_checksums(target, ranks=ranks, known=known)


def _summed(source: Source, sums: dict[str, str]) -> Source:
    """A source that notes the checksum of each tensor when it is first read."""

    def read_tensor(name: str) -> Tensor:
        tensor = source.read_tensor(name)
        sums.setdefault(name, crc32([memoryview(bytes_of(tensor.contiguous()).numpy())]))
        return tensor

    return replace(source, read_tensor=read_tensor)


def _verify(
    output: Path, source: Source, sums: dict[str, str], *, options: ConversionOptions, ranks: Ranks
) -> None:
    """Compare all tensors with what was read of the input, and with what it holds now.

    An output that differs is marked as unfinished.
    """
    problem = None
    try:
        differing = _differing(output, source, sums, options=options, ranks=ranks)
        if differing:
            problem = f"differs from {source.where} in {listed(differing)}"
    except FAILURES as error:
        problem = f"cannot be compared with {source.where}: {cause_of(error)}"
    if problem is not None:
        marked = files.unfinished_path(output.resolve())
        ranks.on_main(lambda: output.resolve().rename(marked))
        raise CheckpointError(
            f"{output} {problem}; it is now {marked}. The input has changed meanwhile, or the disk"
            " does not keep what is written to it; convert again."
        )


def _differing(
    output: Path, source: Source, sums: dict[str, str], *, options: ConversionOptions, ranks: Ranks
) -> list[str]:
    """Names of the tensors that differ, on all ranks."""
    written = ranks.agree(lambda: open_source(output))
    names = list(written.tensors)
    sizes = [info.num_bytes for info in written.tensors.values()]
    # Of all ranks: who wrote a tensor need not compare it.
    first = {name: each for part in ranks.gather(dict(sums)) for name, each in part.items()}

    def compare() -> list[str]:
        own = []
        sums.clear()
        with _progress("verifying", sizes, options=options, ranks=ranks) as compared:
            for index in ranks.share(sizes):
                name = names[index]
                same = same_bits(written.read_tensor(name), source.read_tensor(name))
                if not (same and sums[name] == first[name]):
                    own.append(name)
                compared(sizes[index])
        return own

    return [name for each in ranks.gather(ranks.agree(compare)) for name in each]


@contextmanager
def _progress(
    what: str, sizes: Sequence[int], *, options: ConversionOptions, ranks: Ranks
) -> Iterator[Callable[[int], object]]:
    """What to call with bytes done; the main process shows those of its own share."""
    if options.progress == "none" or not ranks.is_main:
        yield lambda num_bytes: None
        return
    total = sum(sizes[index] for index in ranks.share(sizes))
    what = what if ranks.size == 1 else f"{what}, rank 0 of {ranks.size}"
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=0.5) as bar:
        yield bar.update
