"""The reference's weights in host memory: on the device during its own pass only, and every result
as without.

Here host and device are one memory. A device is made up by letting `Tensor.to` copy a weight, as it
does towards a GPU; where a weight is can then be told from its address.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_vico.parallel.batch import share_step
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.consistency_step import consistency_step
from megatron_vico.training.offload import HostOffload
from megatron_vico.training.setup import Run
from tests.packs import as_blocks
from tests.peak_bytes import PeakBytes
from tests.training_runs import ToyData
from tests.unit.training.test_steps import main_grads, move_away, next_packs, start_run

CPU = torch.device("cpu")


@pytest.fixture
def copying_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """`to` gives new memory for whatever is sent without waiting, as weights are."""
    move = torch.Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moved = move(self, *args, **kwargs)
        return moved.clone() if moved is self and kwargs.get("non_blocking") else moved

    monkeypatch.setattr(torch.Tensor, "to", to)


def addresses(params: Iterable[Tensor]) -> list[int]:
    return [param.data_ptr() for param in params]


def reference_weights(run: Run) -> dict[str, nn.Parameter]:
    """All weights of the run's two models, by name."""
    assert run.reference is not None
    modules = {
        "reference": run.reference.head,
        "reference.encoder": run.reference.encoder,
        "policy": run.policy.head,
        "policy.encoder": run.policy.encoder,
    }
    return {
        f"{owner}.{name}": param
        for owner, module in modules.items()
        for name, param in module.named_parameters()
    }


def moved_by_fetch(run: Run) -> set[str]:
    """Names of the weights that a pass of the reference brings to the device."""
    assert run.reference is not None
    offload = run.reference.offload
    assert offload is not None
    weights = reference_weights(run)
    before = addresses(weights.values())
    offload.fetch()
    during = addresses(weights.values())
    offload.release()
    assert addresses(weights.values()) == before
    return {name for name, one, other in zip(weights, before, during, strict=True) if one != other}


def test_weights_take_device_memory_between_fetch_and_release_only(copying_to: None) -> None:
    params = [nn.Parameter(torch.randn(shape), requires_grad=False) for shape in ((3, 5), (7,))]
    values = [param.detach().clone() for param in params]
    offload = HostOffload(params, CPU)
    home = addresses(params)
    with PeakBytes() as seen:
        for _ in range(2):
            assert seen.live == 0
            offload.fetch()
            assert seen.live == (3 * 5 + 7) * 4
            assert not set(addresses(params)) & set(home)
            assert all(
                torch.equal(param, value) for param, value in zip(params, values, strict=True)
            )
            offload.release()
            assert addresses(params) == home
    assert seen.live == 0
    assert all(torch.equal(param, value) for param, value in zip(params, values, strict=True))


def test_trained_weights_are_refused() -> None:
    with pytest.raises(AssertionError, match="only frozen weights"):
        HostOffload([nn.Parameter(torch.zeros(2))], CPU)


def test_all_of_the_references_language_model_but_its_head_moves(
    toy_data: ToyData, base_checkpoint: Path, groups: Groups, copying_to: None
) -> None:
    run = start_run(toy_data, "consistency", base_checkpoint, groups, reference_offload="host")
    language_model = {name for name in reference_weights(run) if name.startswith("reference.gpt.")}
    head = "reference.gpt.output_layer.weight"
    assert head in language_model
    assert moved_by_fetch(run) == language_model - {head}


def test_what_is_shared_with_the_policy_stays(
    toy_data: ToyData, base_checkpoint: Path, groups: Groups, copying_to: None
) -> None:
    """In the warm-up the whole language model is."""
    run = start_run(toy_data, "warmup", base_checkpoint, groups, reference_offload="host")
    assert moved_by_fetch(run) == set()


def test_a_step_is_the_same_and_the_policy_pass_runs_without_the_reference(
    toy_data: ToyData,
    base_checkpoint: Path,
    groups: Groups,
    copying_to: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and gradients are bitwise equal."""
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    away: dict[str, list[int]] = {"reference": [], "policy": []}
    """How many of the reference's weights are not where they were before the step, in each forward
    and each loss."""
    for offload in ("none", "host"):
        run = start_run(toy_data, "consistency", base_checkpoint, groups, reference_offload=offload)
        assert run.reference is not None
        move_away(run)
        run.policy.train_mode()
        run.policy.zero_grad()
        params = list(run.reference.head.parameters())
        home = addresses(params)

        def count(name: str, params: list[nn.Parameter] = params, home: list[int] = home) -> None:
            away[name].append(
                sum(one != other for one, other in zip(addresses(params), home, strict=True))
            )

        reference, policy = run.reference.head, run.policy.head
        reference.register_forward_pre_hook(lambda *_, count=count: count("reference"))
        policy.register_forward_pre_hook(lambda *_, count=count: count("policy"))
        batch = share_step(as_blocks(next_packs(run)), groups=groups)
        sums = consistency_step(run, batch)
        found.append((sums.loss, main_grads(run)))
    # Two packs without offload, then two with it.
    assert away == {"reference": [0, 0, len(params) - 1, len(params) - 1], "policy": [0, 0, 0, 0]}
    (loss, grads), (offloaded_loss, offloaded_grads) = found
    assert float(loss) > 0
    assert torch.equal(loss, offloaded_loss)
    assert grads.keys() == offloaded_grads.keys()
    assert all(torch.equal(grad, offloaded_grads[name]) for name, grad in grads.items())
