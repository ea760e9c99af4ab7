"""How far an FP8 reference is from the same model in bf16, measured before a run trains by it."""

import dataclasses
from typing import Any

import torch

from megatron_vico.config.megatron_options import TransformerOptions
from megatron_vico.config.schema import RunConfig
from megatron_vico.errors import ConfigError
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.training.compare_plans import ComparedPlans, compare_plans, kl_of_packs
from megatron_vico.training.data_state import build_loader
from megatron_vico.training.setup import Run, load_reference

_PLANS = {"consistency": ("xi",), "router": ("none", "one")}
SHARE_OF_KL = 0.1
"""Of the policy's KL, most that the reference's may be unless the run says otherwise."""


def check_fp8_reference(run: Run) -> str:
    """KL(FP8 reference || bf16 reference) on the first step's packs, told; called by every rank.

    The same model is loaded once more in bf16, beside the FP8 one, for one pass and then let go:
    with weights that are kept in FP8 nothing less would show what rounding them did.

    Raises:
        ConfigError: if it is more than --fp8-max-reference-kl.
    """
    assert run.reference is not None
    batch = _first_packs(run)
    run.policy.eval_mode()
    in_bf16 = dataclasses.replace(
        run, reference=load_reference(bf16_config(run.cfg), run.model, run.policy, run.groups)
    )
    plans = _PLANS[run.cfg.stage.spec.loss]
    expected = compare_plans(in_bf16, batch, plans=plans)
    del in_bf16
    found = compare_plans(run, batch, plans=())
    noise, *kls = _means(run, batch, found=found, expected=expected)
    # Where the policy has several views, its least KL: that of the router's denominator.
    of_policy = min(kls)
    given = run.cfg.stage.fp8_max_reference_kl
    limit = SHARE_OF_KL * of_policy if given is None else given
    text = (
        f"KL(FP8 reference || bf16 reference) is {noise:.2e} nats a response token over the first"
        f" step's packs, KL(bf16 reference || policy) {of_policy:.2e}"
    )
    if not noise <= limit:
        raise ConfigError(
            f"{text}; expected at most {limit:.2e}"
            f" ({'a tenth of the latter' if given is None else '--fp8-max-reference-kl'}). Leave"
            " --fp8-format out, keep more in bf16 (--first-last-layers-bf16), try another"
            " --fp8-recipe, or set --fp8-max-reference-kl."
        )
    return text


def bf16_config(cfg: RunConfig) -> RunConfig:
    """A run's configuration without FP8; packs keep its padding, which the policy knows."""
    fp8: dict[str, Any] = {
        field.name: field.default
        for field in dataclasses.fields(TransformerOptions)
        if "fp8" in field.name or field.name == "moe_router_padding_for_quantization"
    }
    return dataclasses.replace(
        cfg,
        parallel=dataclasses.replace(cfg.parallel, fp8_format=None),
        transformer=dataclasses.replace(cfg.transformer, **fp8),
    )


def _first_packs(run: Run) -> StepBatch:
    loader = None
    if run.groups.replica.rank() == 0:
        loader = build_loader(run.cfg, run.model, run.groups, num_steps=1)
    (batch,) = run.spread(loader, num_steps=1)
    return batch


def _means(
    run: Run, batch: StepBatch, *, found: ComparedPlans, expected: ComparedPlans
) -> list[float]:
    """Of the FP8 reference's KL to bf16 and of the policy's KLs, over samples, on all ranks."""
    assert run.reference is not None
    groups, head = run.groups, run.reference.head
    sums = torch.zeros(1 + len(_PLANS[run.cfg.stage.spec.loss]), device=groups.device)
    if groups.is_last_stage:
        noise_R = kl_of_packs(
            [len(pack.labels) for pack in batch.packs],
            reference=head,
            reference_rows=found.reference_rows,
            policy=head,
            policy_rows=expected.reference_rows,
            groups=groups,
        )
        if groups.counts_loss and groups.language.cp.rank() == 0:
            weight_R = torch.cat([pack.kl_weight for pack in batch.packs]).to(groups.device)
            kls = (noise_R, *expected.kl_R)
            sums = torch.stack([(kl_R * weight_R).sum() for kl_R in kls])
    torch.distributed.all_reduce(sums)
    means: list[float] = sums.tolist()
    return means
