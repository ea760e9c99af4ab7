"""What a step counts and measures on a rank, and the figures that it comes to over all of them.

The names of the figures are those of the log line, metrics.jsonl, TensorBoard and wandb
(training/logger.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from megatron_vico.data.samples import PackedBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.step_clock import PHASES

SHARES = ("0", "25", "50", "75", "100")
"""Samples are told apart by their share of compressed tiles: none (or no tile at all), then up to
so many per cent."""

MARGIN_BINS = 129
_FINEST_MARGIN, _LARGEST_MARGIN = 1e-3, 20.0


@dataclass(frozen=True, kw_only=True)
class RouterSums:
    """What a router step counts on one rank, of its own tiles; float32 tensors that add up."""

    questions: Tensor
    labelled_compress: Tensor
    predicted_compress: Tensor
    correct: Tensor
    log_ratio: Tensor
    margins: Tensor
    """[2 * MARGIN_BINS], questions by label (compress, keep) and by ViR's margin."""

    window: Tensor
    """[4], tau of Eq. 3 and the 10th, 50th and 90th percentile of the window's loss ratios, divided
    by the number of ranks so that the sum is what each has."""


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """What a step counts on one rank; every number adds up over ranks."""

    loss: Tensor
    """This rank's part of the step's loss, a float32 scalar."""

    samples: int
    tiles: int
    compressed_tiles: int
    reference_tokens: int
    policy_tokens: int
    response_tokens: int
    skipped: int = 0
    """Broken samples among `samples` that were not known to be broken before."""

    kl_by_share: Tensor | None = None
    """[len(SHARES)] float32, the step's loss by its samples' share of compressed tiles."""

    weight_by_share: Tensor | None = None
    """[len(SHARES)], the part of the step's samples in each."""

    router: RouterSums | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the loop measures of a rank's step, beside what the step counts."""

    flops: float = 0.0
    """Of the replica (training/flops.py), on its first rank; elsewhere 0."""

    room_tokens: int = 0
    """Tokens that its packs could hold, on its first rank."""

    memory_bytes: tuple[float, float] = (0.0, 0.0)
    """Most that was allocated and reserved on the device so far."""

    phases_s: Mapping[str, float] = field(default_factory=dict)
    peak_tflops: float | None = None
    """The GPU's; None: no MFU."""


def sums_of(
    packs: Sequence[PackedBatch],
    *,
    groups: Groups,
    loss: Tensor,
    kl_by_share: Tensor | None = None,
    router: RouterSums | None = None,
) -> StepSums:
    """Count a replica's packs, on its first rank.

    All counts come from tensors on the CPU, so nothing waits for a device. Of several policy views
    the compression of the last one is reported.
    """
    loss = loss.detach().float()
    if groups.replica.rank() != 0:
        packs = ()
    views = [pack.policies[-1] if pack.policies else pack.reference for pack in packs]
    weight_by_share = None
    if kl_by_share is not None:
        weight_by_share = torch.zeros(len(SHARES), dtype=torch.float64)
        for pack in packs:
            weight_by_share += pack.kl_weight.double() @ one_hot_shares(pack).double()
    return StepSums(
        # Tensor-parallel ranks have the same loss, of which one counts; ViR's is of own tiles.
        loss=loss if groups.counts_loss or router is not None else torch.zeros_like(loss),
        samples=sum(len(pack.keys) for pack in packs),
        tiles=sum(pack.num_tiles for pack in packs),
        compressed_tiles=sum(int(view.compressed.sum()) for view in views),
        reference_tokens=sum(len(pack.reference.token_ids) for pack in packs),
        policy_tokens=sum(len(view.token_ids) for view in views),
        response_tokens=sum(len(pack.labels) for pack in packs),
        skipped=sum(len(pack.skipped) for pack in packs),
        kl_by_share=(
            kl_by_share
            if kl_by_share is None or groups.counts_loss
            else torch.zeros_like(kl_by_share)
        ),
        weight_by_share=weight_by_share,
        router=router,
    )


def one_hot_shares(pack: PackedBatch) -> Tensor:
    """[R, len(SHARES)] float32 on the CPU: 1 where a row's sample belongs.

    A sum over rows is then a product of matrices, whose order of additions is the same every time.
    """
    tiles_D = torch.tensor(pack.tiles_per_sample)
    sample_of_tile = torch.arange(len(tiles_D)).repeat_interleave(tiles_D)
    compressed = pack.policies[0].compressed.long()
    compressed_D = torch.zeros_like(tiles_D).index_add_(0, sample_of_tile, compressed)
    tiles_D = tiles_D.clamp_min(1)
    bucket_D = (compressed_D * (len(SHARES) - 1) + tiles_D - 1) // tiles_D  # the quotient's ceiling
    return (bucket_D[pack.sample_of_row][:, None] == torch.arange(len(SHARES))).float()


def margin_counts(margin_M: Tensor, label_M: Tensor) -> Tensor:
    """[2 * MARGIN_BINS]: how often ViR's logit of compress was so far above that of keep, by label.

    The bins are finest around 0, where an untrained router's margins are.
    """
    most = math.asinh(_LARGEST_MARGIN / _FINEST_MARGIN)
    place_M = (margin_M.detach().float() / _FINEST_MARGIN).asinh().clamp(-most, most) / most
    bin_M = ((place_M + 1) / 2 * (MARGIN_BINS - 1)).round().long()
    counts = torch.zeros(2 * MARGIN_BINS, device=margin_M.device)
    return counts.index_add_(0, label_M * MARGIN_BINS + bin_M, torch.ones_like(place_M))


def area_under_curve(margins: Tensor) -> float | None:
    """The probability that a tile to compress has the larger margin; None without both labels.

    Of two margins in one bin either may be the larger.
    """
    compress, keep = margins.view(2, MARGIN_BINS)
    pairs = float(compress.sum() * keep.sum())
    below = keep.cumsum(0) - keep
    return float((compress * (below + keep / 2)).sum()) / pairs if pairs else None


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """One step over all ranks; a figure that is None is not written."""

    prefix: ClassVar[str] = ""

    iteration: int
    loss: float
    grad_norm: float
    learning_rate: float
    step_time_s: float
    world_size: int = 1
    samples: int
    tiles: int
    compressed_tiles: float
    """Fraction of tiles that the policy saw compressed."""

    visual_token_reduction: float
    """1 - policy tokens / reference tokens, text included."""

    reference_tokens: int = 0
    """Tokens of the packs with nothing compressed, of which the rates count."""

    policy_tokens: int
    response_tokens: int
    skipped: int = 0
    """Broken samples among `samples` that were not known before (data/load/error_budget.py)."""

    fill: float | None = None
    """Reference tokens over the tokens that the packs could hold."""

    tokens_per_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    tflops_per_gpu: float | None = None
    """TFLOP/s a GPU: ViT, reference, compressed policy and heads; nothing counts twice because it
    is recomputed."""

    mfu: float | None = None
    """Of the GPU's dense bf16 peak, whatever the format."""

    work_imbalance: float | None = None
    """FLOPs of the busiest replica over the mean of all."""

    memory_allocated_gb: float | None = None
    """Highest so far, on the rank that had most; 1e9 bytes."""

    memory_reserved_gb: float | None = None
    encode_s: float | None = None
    """Phases are of the step before, means over ranks, waiting for others included."""

    reference_s: float | None = None
    policy_s: float | None = None
    encoder_backward_s: float | None = None
    optimizer_s: float | None = None
    kl_compressed_0: float | None = None
    """Mean KL (Eq. 1) of the samples of which no tile is compressed; nats."""

    kl_compressed_25: float | None = None
    """Of those with up to a quarter compressed; and so on."""

    kl_compressed_50: float | None = None
    kl_compressed_75: float | None = None
    kl_compressed_100: float | None = None
    router_threshold: float | None = None
    router_accuracy: float | None = None
    router_auc: float | None = None
    router_labelled_compress: float | None = None
    router_predicted_compress: float | None = None
    router_mean_log_ratio: float | None = None
    router_ratio_p10: float | None = None
    """Percentiles of the loss ratios r of Eq. 2 in the window."""

    router_ratio_p50: float | None = None
    router_ratio_p90: float | None = None

    @classmethod
    def reduce(
        cls,
        sums: StepSums,
        measured: Measured | None = None,
        *,
        iteration: int,
        grad_norm: float,
        learning_rate: float,
        step_time_s: float,
    ) -> Self:
        """Add up what all ranks counted and measured, in one collective, and make figures of it."""
        measured = measured or Measured()
        world_size = torch.distributed.get_world_size()
        by_rank = torch.zeros(world_size, 3, dtype=torch.float64)
        by_rank[torch.distributed.get_rank()] = torch.tensor(
            [measured.flops, *measured.memory_bytes], dtype=torch.float64
        )
        parts = {name: value for name, value in vars(sums).items() if name != "router"}
        parts |= {} if sums.router is None else vars(sums.router)
        parts |= {"room_tokens": measured.room_tokens, "by_rank": by_rank}
        parts["phases"] = torch.tensor([measured.phases_s.get(phase, 0.0) for phase in PHASES])
        total = _added_over_ranks(parts, device=sums.loss.device)
        numbers = {name: float(value) for name, value in total.items() if len(value) == 1}
        tokens = numbers["reference_tokens"]
        counts = ("samples", "tiles", "reference_tokens", "policy_tokens", "response_tokens")
        return cls(
            iteration=iteration,
            loss=numbers["loss"],
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            step_time_s=step_time_s,
            world_size=world_size,
            **{name: int(numbers[name]) for name in (*counts, "skipped")},
            compressed_tiles=numbers["compressed_tiles"] / max(numbers["tiles"], 1),
            visual_token_reduction=1 - numbers["policy_tokens"] / max(tokens, 1),
            fill=tokens / numbers["room_tokens"] if numbers["room_tokens"] else None,
            **_rates(total["by_rank"].view(-1, 3), tokens, step_time_s, measured.peak_tflops),
            **_phase_figures(total["phases"] / world_size),
            **({} if sums.kl_by_share is None else _kl_figures(total)),
            **({} if sums.router is None else _router_figures(total)),
        )


def _added_over_ranks(
    parts: Mapping[str, Tensor | float | None], *, device: torch.device
) -> dict[str, Tensor]:
    """Each part summed over all ranks, in one dimension, float64 on the CPU; one collective."""
    flat = {
        name: torch.as_tensor(value, dtype=torch.float64).flatten()
        for name, value in parts.items()
        if value is not None
    }
    # What is on the host goes to the device as one piece.
    flat = dict(sorted(flat.items(), key=lambda item: item[1].device.type != "cpu"))
    on_host = [value for value in flat.values() if value.device.type == "cpu"]
    on_device = list(flat.values())[len(on_host) :]
    values = torch.cat([torch.cat(on_host).to(device), *on_device])
    torch.distributed.all_reduce(values)
    lens = [len(value) for value in flat.values()]
    return dict(zip(flat, values.cpu().split(lens), strict=True))


def _rates(
    by_rank: Tensor, tokens: float, time_s: float, peak_tflops: float | None
) -> dict[str, Any]:
    flops, allocated, reserved = by_rank.unbind(dim=1)
    figures = {}
    if allocated.max() > 0:
        figures["memory_allocated_gb"] = float(allocated.max()) / 1e9
        figures["memory_reserved_gb"] = float(reserved.max()) / 1e9
    if (of_replicas := flops[flops > 0]).numel():
        figures["work_imbalance"] = float(of_replicas.max() / of_replicas.mean())
    if time_s > 0:
        figures["tokens_per_s"] = tokens / time_s
        figures["tokens_per_s_per_gpu"] = tokens / time_s / len(by_rank)
        figures["tflops_per_gpu"] = float(flops.sum()) / time_s / len(by_rank) / 1e12
        if peak_tflops is not None:
            figures["mfu"] = figures["tflops_per_gpu"] / peak_tflops
    return figures


def _phase_figures(seconds: Tensor) -> dict[str, Any]:
    """A stage without a phase, and a first step, have none of it."""
    return {
        f"{phase}_s": float(value)
        for phase, value in zip(PHASES, seconds, strict=True)
        if value > 0
    }


def _kl_figures(total: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        f"kl_compressed_{name}": float(kl / weight)
        for name, kl, weight in zip(
            SHARES, total["kl_by_share"], total["weight_by_share"], strict=True
        )
        if weight > 0
    }


def _router_figures(total: Mapping[str, Tensor]) -> dict[str, Any]:
    asked = max(float(total["questions"]), 1)
    threshold, p10, p50, p90 = total["window"].tolist()
    return {
        "router_threshold": threshold,
        "router_accuracy": float(total["correct"]) / asked,
        "router_auc": area_under_curve(total["margins"]),
        "router_labelled_compress": float(total["labelled_compress"]) / asked,
        "router_predicted_compress": float(total["predicted_compress"]) / asked,
        "router_mean_log_ratio": float(total["log_ratio"]) / asked,
        "router_ratio_p10": p10,
        "router_ratio_p50": p50,
        "router_ratio_p90": p90,
    }


@dataclass(frozen=True, kw_only=True)
class ValidationFigures:
    """The validation set after one step, over all ranks: means over samples, NaN without any."""

    prefix: ClassVar[str] = "valid_"

    iteration: int
    loss: float
    """Cross-entropy; KL of Eq. 1 with a part of the tiles compressed; or the router's loss."""

    loss_all_compressed: float | None = None
    """KL of Eq. 1 with every tile compressed."""

    router_accuracy: float | None = None
    router_labelled_compress: float | None = None
    router_predicted_compress: float | None = None
    samples: int
    """Those with an answer; in the router stage, those with an image."""

    time_s: float
