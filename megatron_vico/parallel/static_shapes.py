"""Pipeline sends and receives that know every length, instead of asking the neighbour.

With `variable_seq_lengths`, megatron-core sends the shape of each tensor ahead of it and waits for
the answer on the host: `torch.cuda.synchronize()` and `.tolist()` at every hop. All ranks of a
replica hold the same packs, so each can work out what it will receive.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig


class StaticShapes(P2PCommunicator):
    """The communicator of one run of a schedule; a used one is done with.

    It overrides a private method of megatron-core's, which is why the version is pinned and a test
    counts the shape exchanges of a step (none) and compares every gradient with one process.
    """

    def __init__(
        self,
        pp_group: torch.distributed.ProcessGroup,
        config: TransformerConfig,
        shard_lens: Sequence[int],
    ) -> None:
        """Work out the order of receives, of `shard_lens` hidden states of each microbatch."""
        super().__init__(pp_group, config)
        chunks = self.virtual_pipeline_model_parallel_size or 1
        order = [(microbatch, 0) for microbatch in range(len(shard_lens))]
        if chunks > 1:
            order = get_schedule_table(
                len(shard_lens), chunks, config.microbatch_group_size_per_vp_stage
            )
        # Chunks in running order, which for the backward pass is from the last layers to the first.
        # The first stage receives nothing for its first chunk, nor the last one for its last.
        forward = [index for index, chunk in order if not (self.is_pp_first_stage and chunk == 0)]
        backward = [index for index, chunk in order if not (self.is_pp_last_stage and chunk == 0)]
        self._forward = [self._shape(shard_lens[index]) for index in reversed(forward)]
        self._backward = [self._shape(shard_lens[index]) for index in reversed(backward)]

    def check_finished(self, *, forward_only: bool) -> None:
        """Assert that the schedule received exactly what was foreseen."""
        assert not self._forward, f"{len(self._forward)} foreseen hidden states were never received"
        assert forward_only or not self._backward, (
            f"{len(self._backward)} foreseen gradients were never received"
        )

    def _shape(self, shard_len: int) -> tuple[int, int, int]:
        return shard_len, 1, self.config.hidden_size

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[tuple[int, int, int] | None, tuple[int, int, int] | None]:
        return (
            self._forward.pop() if recv_prev else None,
            self._backward.pop() if recv_next else None,
        )
