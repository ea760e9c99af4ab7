"""Model names that clients choose plans by: internvl@vir, internvl@random=0.55+tiles=24."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vico.errors import ConfigError
from megatron_vico.inference.plans import PlanSource
from megatron_vico.inference.server.chat import MAX_TILES
from megatron_vico.inference.server.errors import ApiError

_CHANGES_REQUESTS = re.compile(r"o1|o3|o4|gpt-5", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A name, and what it stands for."""

    name: str
    plan_name: str
    plan: PlanSource
    max_tiles: int | None


class Models:
    """The names of one checkpoint, a plan each; the first one is its name alone, too."""

    def __init__(
        self, served: str, plan_names: Sequence[str], *, read_plan: Callable[[str], PlanSource]
    ) -> None:
        """ConfigError if a plan cannot be served, or clients would take the name for another."""
        if _CHANGES_REQUESTS.search(served) or set("@+/ ") & set(served) or not served:
            raise ConfigError(
                f"--served-model-name {served!r}: expected a name without '@', '+', '/' and spaces,"
                " and without o1, o3, o4 or gpt-5, for which harnesses send other requests."
            )
        for name in plan_names:
            read_plan(name)
        if not plan_names:
            raise ConfigError("--plans is empty; name at least one, such as none.")
        self.served = served
        self.names = [f"{served}@{name}" for name in plan_names]
        self._default = plan_names[0]
        self._read_plan = read_plan

    def find(self, name: str) -> NamedModel:
        """What a name stands for; ApiError 404 if nothing."""
        base, _, tiles = name.partition("+tiles=")
        served, _, plan_name = base.partition("@")
        plan_name = plan_name or self._default
        try:
            if served != self.served:
                raise ConfigError(f"the model served is {self.served!r}.")
            most = int(tiles) if "+tiles=" in name else None
            if most is not None and not 1 <= most <= MAX_TILES:
                raise ConfigError(f"+tiles={most}: expected 1 to {MAX_TILES}.")
            plan = self._read_plan(plan_name)
        except ValueError as error:  # ConfigError is one
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist: {error} There are"
                f" {', '.join(self.names)}, each also with +tiles=N.",
                param="model",
                code="model_not_found",
            ) from None
        return NamedModel(name=name, plan_name=plan_name, plan=plan, max_tiles=most)

    def label(self, name: str) -> str:
        """The name under which metrics count it: clients can make up any number of names."""
        base = name.partition("+tiles=")[0]
        if base == self.served:
            return self.names[0]
        return base if base in self.names else f"{self.served}@other"
