"""The reference's weights in host memory: on the device during its own pass only, and every result
as without.

Here host and device are one memory; where a weight is can be told from its address.
"""

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vico.training.offload import HostOffload, blocks_for
from megatron_vico.training.setup import Run
from tests.peak_bytes import PeakBytes
from tests.unit.training.test_steps import gradients_of, main_grads, move_away, next_packs

CPU = torch.device("cpu")
WATCHED = (torch.ops.aten.copy_, torch.ops.aten.empty_like)


def addresses(params: Iterable[Tensor]) -> list[int]:
    return [param.data_ptr() for param in params]


def weights_of(run: Run) -> dict[str, nn.Parameter]:
    """All weights of the run's two models, by name."""
    assert run.reference is not None
    reference, policy = run.reference, run.policy
    modules = {"reference": reference.head, "reference_encoder": reference.encoder}
    modules |= {"policy": policy.head, "policy_encoder": policy.encoder}
    return {
        f"{owner}.{name}": param
        for owner, module in modules.items()
        for name, param in module.named_parameters()
    }


def moved_by_fetch(run: Run, offload: HostOffload | None) -> set[str]:
    """Names of the weights that a pass of the reference brings to the device."""
    assert offload is not None
    weights = weights_of(run)
    before = addresses(weights.values())
    offload.fetch()
    during = addresses(weights.values())
    offload.release()
    assert addresses(weights.values()) == before
    return {name for name, one, other in zip(weights, before, during, strict=True) if one != other}


def test_weights_take_device_memory_between_fetch_and_release_only() -> None:
    params = [nn.Parameter(torch.randn(shape), requires_grad=False) for shape in ((3, 5), (7,))]
    values = [param.detach().clone() for param in params]
    offload = HostOffload(params, CPU)
    home = addresses(params)
    with PeakBytes() as seen:
        for _ in range(2):
            assert seen.live == 0
            offload.fetch()
            assert seen.live == (3 * 5 + 7) * 4
            offload.ready()
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


def test_the_references_own_language_model_moves_but_for_its_head(
    start: Callable[..., Run],
) -> None:
    """In the warm-up all of it is the policy's, and stays."""
    run = start("consistency", reference_offload="host")
    language_model = {name for name in weights_of(run) if name.startswith("reference.gpt.")}
    head = "reference.gpt.output_layer.weight"
    assert head in language_model
    assert run.reference is not None
    assert moved_by_fetch(run, run.reference.offload) == language_model - {head}
    warmup = start("warmup", reference_offload="host").reference
    assert warmup is not None
    assert moved_by_fetch(run, warmup.offload) == set()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["vit", "host"])
def test_the_references_own_vit_moves_for_its_pass_over_the_tiles(
    option: str, start: Callable[..., Run]
) -> None:
    """Loss and gradients are bitwise equal; what the reference never uses it does not have."""
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for offload in ("none", option):
        run = start(
            "consistency", train_modules=("vit", "language_model"), reference_offload=offload
        )
        reference = run.reference
        assert reference is not None
        own = {name for name in weights_of(run) if name.startswith("reference_encoder.vit.")}
        if offload != "none":
            assert moved_by_fetch(run, reference.vit_offload) == own
        assert not any(
            "vir" in name or "16x" in name for name, _ in reference.encoder.named_parameters()
        )
        home, seen = addresses(reference.encoder.vit.parameters()), []
        reference.encoder.vit.register_forward_pre_hook(
            lambda vit, _, seen=seen: seen.append(addresses(vit.parameters()))
        )
        move_away(run)
        found.append((gradients_of(run, next_packs(run)).loss, main_grads(run)))
        assert seen
        assert all((each == home) == (offload == "none") for each in seen)
        assert addresses(reference.encoder.vit.parameters()) == home
    (loss, grads), (offloaded_loss, offloaded_grads) = found
    assert torch.equal(loss, offloaded_loss)
    assert all(torch.equal(grad, offloaded_grads[name]) for name, grad in grads.items())


@pytest.mark.parametrize(
    ("stage", "unused"),
    [("pretrain", {"connector_16x", "vir"}), ("consistency", {"vir"}), ("router", set())],
)
def test_modules_that_a_stage_does_not_use_are_in_host_memory(
    stage: str, unused: set[str], start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "cpu", lambda self: moved.append(self))
    encoder = start(stage).policy.encoder
    assert {name for name, module in encoder.named_children() if module in moved} == unused
    assert len(moved) == len(unused)


@pytest.mark.slow
def test_a_step_is_the_same_and_the_policy_pass_runs_without_the_reference(
    start: Callable[..., Run],
) -> None:
    """Loss and gradients are bitwise equal."""
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    away: dict[str, list[int]] = {"reference": [], "policy": []}
    """How many of the reference's weights are not where they were before the step, in each forward
    and each loss."""
    for offload in ("none", "host"):
        run = start("consistency", reference_offload=offload)
        assert run.reference is not None
        move_away(run)
        params = list(run.reference.head.parameters())
        home = addresses(params)

        def count(name: str, params: list[nn.Parameter] = params, home: list[int] = home) -> None:
            away[name].append(
                sum(one != other for one, other in zip(addresses(params), home, strict=True))
            )

        reference, policy = run.reference.head, run.policy.head
        reference.register_forward_pre_hook(lambda *_, count=count: count("reference"))
        policy.register_forward_pre_hook(lambda *_, count=count: count("policy"))
        found.append((gradients_of(run, next_packs(run)).loss, main_grads(run)))
    # Two packs without offload, then two with it.
    assert away == {"reference": [0, 0, len(params) - 1, len(params) - 1], "policy": [0, 0, 0, 0]}
    (loss, grads), (offloaded_loss, offloaded_grads) = found
    assert float(loss) > 0
    assert torch.equal(loss, offloaded_loss)
    assert grads.keys() == offloaded_grads.keys()
    assert all(torch.equal(grad, offloaded_grads[name]) for name, grad in grads.items())


def test_weights_are_on_their_way_while_tiles_are_encoded(start: Callable[..., Run]) -> None:
    run = start("consistency", reference_offload="host")
    assert run.reference is not None
    params = list(run.reference.head.parameters())
    home, seen = addresses(params), []
    run.policy.encoder.vit.register_forward_pre_hook(lambda *_: seen.append(addresses(params)))
    gradients_of(run, next_packs(run))
    assert len(set(home) & set(seen[0])) == 1  # the head stays
    assert addresses(params) == home


def test_page_locked_blocks_are_full() -> None:
    """torch makes each a power of two; 8B's layers one by one would take 1.3 times their size."""
    width, wide, head = 4096, 12288, 128
    matrices = [(32 + 16) * head * width, 32 * head * width, 2 * wide * width, wide * width]
    num_bytes = [2 * size for size in (*matrices, width, width, head, head)] * 36
    alone = sum(1 << (size - 1).bit_length() for size in num_bytes)
    assert 1.25 < alone / sum(num_bytes) < 1.35
    blocks, places = blocks_for(num_bytes)
    assert all(size & (size - 1) == 0 for size in blocks)
    assert sum(blocks) < 1.15 * sum(num_bytes)  # 1.12
    ends = [0] * len(blocks)
    for (block, start), size in zip(places, num_bytes, strict=True):
        assert start >= ends[block], "weights do not overlap"
        ends[block] = start + size
    assert all(end <= size for end, size in zip(ends, blocks, strict=True))


def test_copies_run_beside_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream of their own, behind what used the memory before; only `ready` waits for them."""
    seen: list[str] = []
    own = types.SimpleNamespace(
        wait_stream=lambda stream: seen.append(f"behind {stream.name}"),
        record_event=lambda: "arrival",
    )
    computing = types.SimpleNamespace(name="computing", wait_event=seen.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: computing)

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        assert stream is own
        seen.append("own stream")
        yield
        seen.append("back")

    monkeypatch.setattr(torch.cuda, "stream", on)
    offload = HostOffload([nn.Parameter(torch.ones(3), requires_grad=False)], CPU)

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.extend([func.overloadpacket.__name__] if func.overloadpacket in WATCHED else [])
            return func(*args, **(kwargs or {}))

    with Copies():
        offload.fetch()
        seen.append("fetched")
        offload.ready()
    copied = ["own stream", "copy_", "back"]
    assert seen == ["behind computing", "empty_like", *copied, "fetched", "arrival"]
