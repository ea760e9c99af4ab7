"""Train InternVL3.5 models to choose 64 or 256 visual tokens per tile (ViCO), on megatron-core.

From Python: `load_model` gives a model to route and to ask; `plan_none`, `plan_all`,
`plan_fraction`, `plan_stratified` draw compression plans, `forward_kl` is Eq. 1 of a response row,
`loss_ratio` and `labels_from_ratios` are Eq. 2 and 3, `paper_rule` and `flash_rule` read ViR.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megatron_vico.api import load_model
    from megatron_vico.vico.compression_plan import (
        plan_all,
        plan_fraction,
        plan_none,
        plan_stratified,
    )
    from megatron_vico.vico.consistency import forward_kl
    from megatron_vico.vico.router_targets import labels_from_ratios, loss_ratio
    from megatron_vico.vico.routing import flash_rule, paper_rule

__all__ = [
    "flash_rule",
    "forward_kl",
    "labels_from_ratios",
    "load_model",
    "loss_ratio",
    "paper_rule",
    "plan_all",
    "plan_fraction",
    "plan_none",
    "plan_stratified",
]

_HOMES = {
    "load_model": "api",
    "forward_kl": "vico.consistency",
    "loss_ratio": "vico.router_targets",
    "labels_from_ratios": "vico.router_targets",
    "paper_rule": "vico.routing",
    "flash_rule": "vico.routing",
}


def __getattr__(name: str) -> Any:
    """A name of the surface, whose module (torch, megatron-core) is imported only now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "vico.compression_plan")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
