"""What each of the four stages trains, with which loss, and whether it needs the frozen
reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_vico.config.schema import Module, Stage, StageOptions


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage of ViCO's training."""

    loss: Literal["cross_entropy", "consistency", "router"]
    """Next-token cross-entropy, Eq. 1, or the cross-entropy of Eq. 3's labels."""

    train_modules: tuple[Module, ...]
    """Modules that get gradients unless --train-modules says otherwise; all others are frozen."""


STAGES: Mapping[Stage, StageSpec] = {
    "pretrain": StageSpec(
        loss="cross_entropy", train_modules=("vit", "connector_4x", "language_model")
    ),
    # The 16x connector is new: it learns Eq. 1 alone before the rest of the model follows (paper,
    # section 4.1).
    "warmup": StageSpec(loss="consistency", train_modules=("connector_16x",)),
    # Neither paper nor report says that the vision tower is frozen here ("the entire model is
    # trained"). Frozen is the default since one ViT pass then serves policy and reference: at 241B
    # a third of the step's arithmetic.
    "consistency": StageSpec(
        loss="consistency", train_modules=("connector_4x", "connector_16x", "language_model")
    ),
    "router": StageSpec(loss="router", train_modules=("vir",)),
}


def train_modules(options: StageOptions) -> tuple[Module, ...]:
    """The modules that get gradients in this run."""
    return (
        options.train_modules
        if options.train_modules is not None
        else STAGES[options.stage].train_modules
    )


def needs_reference(options: StageOptions) -> bool:
    """Whether the stage compares with the frozen reference."""
    return STAGES[options.stage].loss != "cross_entropy"


def lr_factors(options: StageOptions) -> dict[Module, float]:
    """--lr-mult as a table; `config/validate.py` has checked names and numbers."""
    pairs = (item.split("=", 1) for item in options.lr_mult)
    return {name: float(factor) for name, factor in pairs}  # type: ignore[misc]
