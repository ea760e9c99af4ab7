"""What the reference pass leaves behind: the response rows of each pack, and nothing else."""

import gc
from collections.abc import Callable, Sequence

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


def pass_bytes(run: Callable[[], Sequence[Tensor | None]]) -> tuple[int, int, int]:
    """Bytes of the rows that a pass hands out, and of what is new after it and, at most, during it;
    without the scratch memory inside an operator."""
    gc.collect()
    with PeakBytes() as seen:
        rows = run()
        gc.collect()
    return sum(each.nbytes for each in rows if each is not None), seen.live, seen.peak


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


def measured(num_packs: int, groups: Groups, *, graph: bool = False) -> tuple[int, int, int]:
    """A pass over packs of one shape; `graph`: as a pass would be that forgets no_grad over weights
    with gradients."""
    reference, batch = make_reference(), make_batch(num_packs, groups)
    inputs = [language_inputs(pack.reference, StreamCut(), groups.device) for pack in batch.packs]
    tokens = reference.visual_tokens(batch, None, inputs=inputs, groups=groups)
    if graph:
        chunk = reference.head.requires_grad_()
        return pass_bytes(lambda: [chunk(each, tokens.of(i)) for i, each in enumerate(inputs)])
    return pass_bytes(lambda: reference.response_rows(inputs, tokens, groups=groups))


def test_nothing_is_kept_but_the_response_rows(groups: Groups) -> None:
    """Measured: 16,384 bytes a pack, to the byte; the peak, 2,216,708 at 2 packs, grows by the rows
    alone."""
    (rows, kept, peak), (many_rows, many_kept, many_peak) = (measured(n, groups) for n in (2, 8))
    assert rows == kept == 2 * ROWS_BYTES
    assert many_rows == many_kept == 8 * ROWS_BYTES
    assert many_peak - peak == 6 * ROWS_BYTES
    assert peak > 10 * kept, "the peak counts activations"


def test_a_graph_would_be_seen(groups: Groups) -> None:
    """Measured: 8.7 MB a pack, for rows of 16 KB."""
    (rows, *few), (_, *many) = (measured(number, groups, graph=True) for number in (2, 8))
    assert rows == 2 * ROWS_BYTES
    for less, more in zip(few, many, strict=True):  # what is kept, and the peak
        assert more - less > 6 * 100 * ROWS_BYTES
