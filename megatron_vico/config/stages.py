"""The table of stages.

A fifth stage is one row here, its name in `Stage`, and its step in `training/steps.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Stage = Literal["pretrain", "warmup", "consistency", "router"]
Module = Literal["vit", "connector_4x", "connector_16x", "vir", "language_model"]

MODULES: tuple[Module, ...] = ("vit", "connector_4x", "connector_16x", "vir", "language_model")


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage of ViCO's training."""

    loss: Literal["cross_entropy", "consistency", "router"]
    """Next-token cross-entropy, Eq. 1, or the cross-entropy of Eq. 3's labels."""

    plans: Literal["none", "xi", "one_tile"]
    """What the policy sees of a pack: the uncompressed stream (none); one view in which the share
    xi of each image's tiles is compressed (xi); or two, with nothing and with one tile (or image) a
    sample compressed (one_tile)."""

    trainable: tuple[Module, ...]
    """Modules that the loss reaches and may move; --train-modules chooses among them."""

    train_modules: tuple[Module, ...]
    """Modules that get gradients unless --train-modules says otherwise; all others are frozen."""

    unused: tuple[Module, ...] = ()
    """Modules that no pass goes through: in checkpoints, but not on the device."""

    reference: Literal["none", "start", "named"]
    """What the policy is compared with: nothing, the weights that the stage starts from (or
    --reference-load), or always --reference-load."""

    options: tuple[str, ...]
    """Options that have an effect in this stage, of those that have none in another one."""

    figures: tuple[str, ...]
    """Means over the samples of a validation set, as they are logged after `valid_`."""

    @property
    def needs_reference(self) -> bool:
        """Whether the policy is compared with a frozen reference."""
        return self.reference != "none"


_REFERENCE = ("reference_load", "reference_offload", "fp8_max_reference_kl")
_RECOMPUTE = ("recompute_granularity",)
_ROUTER = ("router_granularity", "router_window", "router_percentile", "router_eps")

STAGES: Mapping[Stage, StageSpec] = {
    "pretrain": StageSpec(
        loss="cross_entropy",
        plans="none",
        trainable=("vit", "connector_4x", "language_model"),
        train_modules=("vit", "connector_4x", "language_model"),
        unused=("connector_16x", "vir"),
        reference="none",
        options=_RECOMPUTE,
        figures=("loss",),
    ),
    # The 16x connector is new: it learns Eq. 1 alone before the rest of the model follows (paper,
    # section 4.1).
    "warmup": StageSpec(
        loss="consistency",
        plans="xi",
        trainable=("connector_16x",),
        train_modules=("connector_16x",),
        unused=("vir",),
        reference="start",
        options=("xi_sampler", *_REFERENCE, *_RECOMPUTE),
        figures=("loss", "loss_all_compressed"),
    ),
    # Neither paper nor report says that the vision tower is frozen here ("the entire model is
    # trained"). Frozen is the default since one ViT pass then serves policy and reference: at 241B
    # a third of the step's arithmetic.
    "consistency": StageSpec(
        loss="consistency",
        plans="xi",
        trainable=("vit", "connector_4x", "connector_16x", "language_model"),
        train_modules=("connector_4x", "connector_16x", "language_model"),
        unused=("vir",),
        reference="start",
        options=("xi_sampler", *_REFERENCE, *_RECOMPUTE),
        figures=("loss", "loss_all_compressed"),
    ),
    # No backward pass goes through the policy, so there is nothing to recompute.
    "router": StageSpec(
        loss="router",
        plans="one_tile",
        trainable=("vir",),
        train_modules=("vir",),
        reference="named",
        options=(*_ROUTER, *_REFERENCE),
        figures=(
            "loss",
            "router_accuracy",
            "router_labelled_compress",
            "router_predicted_compress",
        ),
    ),
}
