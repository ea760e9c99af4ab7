"""What the reference pass leaves behind: the response rows of each pack, and nothing else."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.parallel.batch import StepBatch, share_step
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.streams import StreamCut, language_inputs
from megatron_vico.planning.synthetic_packs import PackShape, synthetic_pack
from megatron_vico.training.reference import Reference
from tests.peak_bytes import PeakBytes
from tests.toy_models import make_encoder, make_language_model

TOY = get_model_config("toy")
SHAPE = PackShape.of_length(256, model=TOY)
ROWS_BYTES = (
    sum(text_len - text_len // 2 for text_len in SHAPE.text_lens) * TOY.language.hidden_size * 4
)


@dataclass(frozen=True, kw_only=True)
class PassBytes:
    """What one pass over several packs allocates."""

    rows: int
    """Bytes of the rows that it hands out."""

    kept: int
    """New bytes that live after it."""

    peak: int
    """The most new bytes that live during it."""


def pass_bytes(run: Callable[[], Sequence[Tensor | None]], device: torch.device) -> PassBytes:
    """Bytes that a pass allocates, where all that it works on exists before; the GPU's branch was
    never run.

    Args:
        run: does the pass and returns its rows.
        device: where it computes.

    Returns:
        On the CPU, counted from what torch allocates, without the scratch memory inside an
        operator.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        rows = run()
        gc.collect()
        kept, peak = (
            torch.cuda.memory_allocated() - before,
            torch.cuda.max_memory_allocated() - before,
        )
    else:
        with PeakBytes() as seen:
            rows = run()
            gc.collect()
        kept, peak = seen.live, seen.peak
    return PassBytes(
        rows=sum(each.nbytes for each in rows if each is not None), kept=kept, peak=peak
    )


def make_reference() -> Reference:
    encoder, language_model = make_encoder(TOY), make_language_model(TOY)
    encoder.requires_grad_(False)
    language_model.requires_grad_(False)
    return Reference(
        encoder=encoder, language_chunks=(language_model,), shares_vit=False, chunk_tiles=16
    )


def make_batch(num_packs: int, groups: Groups) -> StepBatch:
    packs = [
        synthetic_pack(
            SHAPE, model=TOY, stage="consistency", number=number, samples_in_global_batch=8
        )
        for number in range(num_packs)
    ]
    return share_step(packs, groups=groups)


def measured(num_packs: int, groups: Groups, *, graph: bool = False) -> PassBytes:
    """A pass over packs of one shape; `graph`: as a pass would be that forgets no_grad over weights
    with gradients."""
    reference, batch = make_reference(), make_batch(num_packs, groups)
    inputs = [language_inputs(pack.reference, StreamCut(), groups.device) for pack in batch.packs]
    tokens = reference.visual_tokens(batch, None, inputs=inputs, groups=groups)
    if graph:
        chunk = reference.head.requires_grad_()
        return pass_bytes(
            lambda: [chunk(each, tokens.of(index)) for index, each in enumerate(inputs)],
            groups.device,
        )
    return pass_bytes(lambda: reference.response_rows(inputs, tokens, groups=groups), groups.device)


def test_nothing_is_kept_but_the_response_rows(groups: Groups) -> None:
    """Measured: 16,384 bytes a pack, to the byte; the peak, 2,216,708 at 2 packs, grows by the rows
    alone."""
    few, many = measured(2, groups), measured(8, groups)
    assert (few.kept, many.kept) == (2 * ROWS_BYTES, 8 * ROWS_BYTES)
    assert (few.rows, many.rows) == (few.kept, many.kept)
    assert many.peak - few.peak == 6 * ROWS_BYTES
    assert few.peak > 10 * few.kept, "the peak counts activations"


def test_a_graph_would_be_seen(groups: Groups) -> None:
    """Measured: 8.7 MB a pack, for rows of 16 KB."""
    few, many = measured(2, groups, graph=True), measured(8, groups, graph=True)
    assert few.rows == 2 * ROWS_BYTES
    assert many.kept - few.kept > 6 * 100 * ROWS_BYTES
    assert many.peak - few.peak > 6 * 100 * ROWS_BYTES
