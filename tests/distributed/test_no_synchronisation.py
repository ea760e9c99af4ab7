"""Nothing between the reference pass and the policy pass waits for all ranks, for a length, or for
the device.

One launch of four processes runs one consistency step under each layout with every collective,
send, receive and read of a tensor's value on record. In it the last stage's last reference forward
pass waits until the first stage has begun with the policy: with anything between the passes that
synchronises the ranks, it would wait in vain.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vico.config.schema import DdpOptions, ParallelOptions, RunConfig
from megatron_vico.config.validate import validate
from megatron_vico.parallel.groups import started
from tests.distributed.launch import on_ranks
from tests.distributed.recorder import Event, RankRecord
from tests.distributed.step_records import save_models
from tests.distributed.trace_ranks import records_of
from tests.training_runs import ToyData, toy_config

WORLD = 4
PP4 = {"pipeline_model_parallel_size": 4}
PP2_VPP2_DP2 = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
# The hardest for "no collective": gradients are reduced, and parameters gathered, while the policy
# pass runs.
OVERLAP = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
LAYOUTS = {"pp4": PP4, "pp2 vpp2 dp2": PP2_VPP2_DP2 | OVERLAP}
PASSES = ("reference", "between", "policy")
GRAD_REDUCTION = "megatron/core/distributed/"

Records = dict[str, list[RankRecord]]


@pytest.fixture(scope="module")
def records(
    toy_data: ToyData, single_process_groups: None, tmp_path_factory: pytest.TempPathFactory
) -> Records:
    """What each rank did, by case."""
    folder = tmp_path_factory.mktemp("trace")
    with started(ParallelOptions(), seed=1, timeout_minutes=1) as groups:
        save_models(
            folder / "models",
            "toy-6b",
            toy_config(toy_data, "pretrain", model_size="toy-6b"),
            groups,
        )
    make = _config_maker(toy_data, folder / "models")
    cases = {name: (make(options), "none", 60.0) for name, options in LAYOUTS.items()}
    cases["barrier"] = (make(PP4), "barrier", 5.0)
    cases |= {
        f"{name}, shapes": (make(options), "shape exchange", 60.0)
        for name, options in LAYOUTS.items()
    }
    ranks = on_ranks(records_of, cases, folder, num_ranks=WORLD)
    return {name: [rank[name] for rank in ranks] for name in cases}


def _config_maker(data: ToyData, models: Path) -> Callable[[dict[str, Any]], RunConfig]:
    def make(options: dict[str, Any]) -> RunConfig:
        cfg = toy_config(
            data,
            "consistency",
            model_size="toy-6b",
            pretrained_checkpoint=str(models / "policy"),
            reference_load=str(models / "reference"),
            train_iters=2,
            global_batch_size=8,
            max_samples_per_pack=2,
            kl_chunk_rows=7,
            **options,
        )
        validate(cfg, WORLD)
        # Buckets so small that each module has its own, and its own waiting.
        return dataclasses.replace(cfg, ddp=DdpOptions(ddp_bucket_size=3000))

    return make


def _events(record: RankRecord, kind: str) -> list[Event]:
    return [event for event in record.events if event.kind == kind and event.phase in PASSES]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_policy_begins_while_the_reference_runs(name: str, records: Records) -> None:
    """An order that the handshake makes sure of, not a matter of speed."""
    ranks = records[name]
    assert all(rank.met for rank in ranks), (
        "the first stage waited for the last one between the passes"
    )
    begins = [_edge(rank, "policy", "start", min) for rank in ranks if rank.is_first_stage]
    ends = [_edge(rank, "reference", "end", max) for rank in ranks if rank.is_last_stage]
    assert len(begins) == len(ends) == (1 if name == "pp4" else 2)
    assert max(begins) < max(ends)
    for rank in ranks:  # and on each rank alone, the reference is through before the policy begins
        assert _edge(rank, "reference", "end", max) < _edge(rank, "policy", "start", min)


def _edge(rank: RankRecord, name: str, edge: str, pick: Callable[[list[float]], float]) -> float:
    times = [getattr(span, edge) for span in rank.spans if span.name.startswith(f"{name} forward")]
    assert len(times) == 8  # microbatches of one chunk, or 4 of each of two
    return pick(times)


def test_a_barrier_between_the_passes_is_seen(records: Records) -> None:
    """The negative control of the handshake and of the record of collectives."""
    ranks = records["barrier"]
    assert [rank.met for rank in ranks] == [not rank.is_last_stage for rank in ranks]
    for rank in ranks:
        (barrier,) = [event for event in _events(rank, "collective") if event.call == "barrier"]
        assert (barrier.phase, barrier.num_ranks) == ("between", WORLD)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_collective_in_the_passes_but_the_reduction_of_gradients(
    name: str, records: Records
) -> None:
    for rank in records[name]:
        collectives = [event for event in _events(rank, "collective") if event.num_ranks > 1]
        others = [event for event in collectives if not event.caller.startswith(GRAD_REDUCTION)]
        assert others == []
        assert all(event.phase == "policy" for event in collectives)
        assert bool(collectives) == (name != "pp4")  # the recorder sees those of data parallelism
        # Before the passes it sees ours: visual tokens go to the ranks that embed them.
        assert "alltoall_base_" in {event.call for event in rank.events if event.is_ours}


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_hidden_states_and_their_gradients_are_sent(name: str, records: Records) -> None:
    for rank in records[name]:
        sent = _events(rank, "p2p")
        assert {event.phase for event in sent} == {"reference", "policy"}
        assert {(event.dtype, event.shape[1:]) for event in sent} == {("torch.float32", (1, 48))}
        forward = {span.name for span in rank.spans if span.name.startswith("policy forward")}
        packs = len({name.split("chunk")[0] for name in forward})
        assert (
            len({event.shape for event in sent}) > packs
        )  # lengths differ from pack to pack and between the passes
        assert rank.shape_exchanges == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_megatrons_own_communicator_would_send_shapes(name: str, records: Records) -> None:
    """The control of the one before: the recorder sees shapes where they are sent."""
    for rank, known in zip(records[f"{name}, shapes"], records[name], strict=True):
        shapes = [
            event
            for event in _events(rank, "p2p")
            if (event.dtype, event.shape) == ("torch.int64", (3,))
        ]
        assert len(shapes) == len(_events(known, "p2p"))  # one for each tensor
        assert rank.shape_exchanges > 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_of_ours_in_the_passes_waits_for_the_device(name: str, records: Records) -> None:
    for rank in records[name]:
        assert [event for event in _events(rank, "read") if event.is_ours] == []
        # The recorder sees what is read before the passes, where streams are made on the CPU.
        assert "tolist" in {
            event.call for event in rank.events if event.is_ours and event.phase == "before"
        }


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_host_goes_on_at_a_hop(name: str, records: Records) -> None:
    def waits(case: str) -> bool:
        events = (event for rank in records[case] for event in _events(rank, "read"))
        return any(event.call == "synchronize" for event in events)

    assert not waits(name)
    assert waits(f"{name}, shapes")  # where megatron-core sends shapes, it is seen
