"""The frozen reference: the model from before consistency training, always on uncompressed images.

Only its response rows [R, H] leave it, never logits. What the policy keeps frozen and bitwise equal is shared with it
instead of held twice: the ViT in the usual stages, everything but the 16x connector in the warm-up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageInputs, LanguageModel
from megatron_vico.training.passes import forward_pass, tile_features


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A frozen encoder and language model, in no DDP wrapper, optimizer or checkpoint."""

    encoder: VisionEncoder
    language_model: LanguageModel

    shares_vit: bool
    """Whether its ViT is the policy's, so that one ViT pass over the tiles serves both."""

    def visual_tokens(self, tiles: Tensor, policy_features_NPD: Tensor, device: torch.device) -> Tensor:
        """Visual tokens of a pack with nothing compressed.

        Args:
            tiles: [N, 3, S, S] uint8, on the CPU.
            policy_features_NPD: the policy's ViT outputs, used instead of a second pass where the ViT is shared.
            device: where to compute.

        Returns:
            [V, H], without a graph.
        """
        with torch.no_grad():
            features_NPD = policy_features_NPD.detach()
            if not self.shares_vit:
                features_NPD = tile_features(self.encoder, tiles, device, trained=False)
            return self.encoder.visual_tokens(features_NPD, None)

    def response_rows(
        self, inputs: Sequence[LanguageInputs], visual_tokens: Sequence[Tensor], *, groups: ProcessGroupCollection
    ) -> list[Tensor]:
        """Hidden states [R, H] that predict each response token, one tensor a pack."""
        return forward_pass(self.language_model, inputs, visual_tokens, groups=groups)


def share_equal_modules(reference: nn.Module, policy: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Replace children of `reference` by the policy's where the policy's are frozen and bitwise equal.

    Args:
        reference: frozen module.
        policy: module of the same structure.
        names: children to look at.

    Returns:
        The names that are now shared.
    """
    shared = tuple(name for name in names if _frozen_and_equal(getattr(policy, name), getattr(reference, name)))
    for name in shared:
        setattr(reference, name, getattr(policy, name))
    return shared


def _frozen_and_equal(policy: nn.Module, reference: nn.Module) -> bool:
    if any(param.requires_grad for param in policy.parameters()):
        return False
    pairs = zip(policy.parameters(), reference.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)
