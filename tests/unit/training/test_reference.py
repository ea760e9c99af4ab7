"""The frozen reference beside a policy with experts: neither gets in the other's way."""

from pathlib import Path

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_vico.config.schema import RunConfig
from megatron_vico.parallel.groups import started
from megatron_vico.training.setup import set_up
from megatron_vico.training.trainer import compute_gradients, train, update_weights
from tests.training_runs import ToyData, toy_config


def test_a_reference_with_experts_moves_nothing(
    toy_data: ToyData, single_process_groups: None, tmp_path: Path
) -> None:
    options = {"model_size": "toy-moe", "moe_aux_loss_coeff": 0.01}
    train(toy_config(toy_data, "pretrain", train_iters=1, save=str(tmp_path / "base"), **options))
    base = {"pretrained_checkpoint": str(tmp_path / "base")}
    cfg = toy_config(toy_data, "consistency", train_iters=2, **base, **options)
    with started(RunConfig().parallel, seed=1, timeout_minutes=1) as groups:
        run = set_up(cfg, groups)
        reference = run.reference
        assert reference is not None
        assert reference.head.config is not run.policy.head.config
        before = [param.detach().clone() for param in reference.head.parameters()]
        optimized = {id(param) for group in run.optimizer.param_groups for param in group["params"]}
        run.policy.train_mode()
        for batch in run.batches():
            sums = compute_gradients(run, batch)
            # The scale is one for the whole process, and the reference's schedule sets it too: the
            # policy's must win.
            tokens = sum(len(pack.policies[0].token_ids) for pack in batch.packs)
            assert MoEAuxLossAutoScaler.main_loss_backward_scale is not None
            torch.testing.assert_close(
                MoEAuxLossAutoScaler.main_loss_backward_scale, torch.tensor([1 / tokens])
            )
            update_weights(run)
            assert torch.isfinite(sums.loss)
        for param, value in zip(reference.head.parameters(), before, strict=True):
            assert torch.equal(param, value)
            assert param.grad is None
            assert not hasattr(param, "main_grad")
            assert id(param) not in optimized
        pairs = zip(run.policy.head.parameters(), reference.head.parameters(), strict=True)
        assert not all(torch.equal(policy, frozen) for policy, frozen in pairs)
