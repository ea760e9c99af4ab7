"""The frozen reference: the model from before consistency training, always on uncompressed images.

Only its response rows [R, H] leave it, never logits. What the policy keeps frozen and bitwise equal
is shared instead of held twice: the ViT in the usual stages, everything but the 16x connector in
the warm-up.

A step asks a reference for three things: the visual tokens it wants embedded, its response rows,
and, for the KL head, its last chunk with the vocabulary head. A reference that lives in another
layout or on other ranks comes behind the same three.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageInputs, LanguageModel
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.offload import HostOffload
from megatron_vico.training.pipeline_schedule import LanguagePass, forward_pass
from megatron_vico.training.vision import VisualTokens, visual_tokens


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A frozen encoder and language model in the policy's layout; in no DDP or checkpoint."""

    encoder: VisionEncoder
    language_chunks: tuple[LanguageModel, ...]

    shares_vit: bool
    """Whether its ViT is the policy's, so that one ViT pass over the tiles serves both."""

    chunk_tiles: int
    """Tiles that go through its ViT at once."""

    equals_policy: bool = False
    """Whether this rank's part computes what the policy does with nothing compressed."""

    offload: HostOffload | None = None
    """Where its language model is between two passes, if not on the device."""

    vit_offload: HostOffload | None = None
    """Where its ViT is, if not on the device."""

    @property
    def head(self) -> LanguageModel:
        """The chunk with the vocabulary head, on the last pipeline stage."""
        return self.language_chunks[-1]

    def fetch(self) -> None:
        """Begin to bring what is in the host's memory, where a step begins."""
        for offload in (self.vit_offload, self.offload):
            if offload is not None:
                offload.fetch()

    def visual_tokens(
        self,
        batch: StepBatch,
        policy_features_NPD: Tensor | None,
        *,
        inputs: Sequence[LanguageInputs],
        groups: Groups,
    ) -> VisualTokens:
        """Visual tokens of a step with nothing compressed; called by every rank of the replica.

        The policy's ViT outputs serve instead of a second pass where the ViT is shared.
        """
        if self.vit_offload is not None:
            self.vit_offload.ready()
        tokens = visual_tokens(
            self.encoder,
            batch,
            [pack.reference.compressed for pack in batch.packs],
            inputs=inputs,
            features_NPD=policy_features_NPD if self.shares_vit else None,
            chunk_tiles=self.chunk_tiles,
            trained=False,
            groups=groups,
        )
        if self.vit_offload is not None:
            self.vit_offload.release()
        return tokens

    def response_rows(
        self,
        inputs: Sequence[LanguageInputs],
        tokens: VisualTokens,
        *,
        groups: Groups,
    ) -> list[Tensor | None]:
        """The reference pass over the uncompressed stream of each pack.

        Returns:
            Hidden states [R, H] that predict each response token, one tensor a pack, on the last
            pipeline stage; elsewhere an empty list.
        """
        if self.offload is not None:
            self.offload.ready()
        rows = forward_pass(
            LanguagePass(
                name="reference",
                chunks=self.language_chunks,
                inputs=inputs,
                tokens=tokens,
                groups=groups.language,
            )
        )
        for chunk in self.language_chunks:
            # megatron-core would keep the hidden states that the previous stage sent last.
            chunk.set_input_tensor(None)
        if self.offload is not None:
            self.offload.release()
        return list(rows)


def share_equal_modules(
    reference: nn.Module, policy: nn.Module, names: Sequence[str]
) -> tuple[str, ...]:
    """Replace children of `reference` by the policy's where those are frozen and bitwise equal.

    Returns the names that are now shared.
    """
    shared = tuple(
        name for name in names if _frozen_and_equal(getattr(policy, name), getattr(reference, name))
    )
    for name in shared:
        setattr(reference, name, getattr(policy, name))
    return shared


def _frozen_and_equal(policy: nn.Module, reference: nn.Module) -> bool:
    if any(param.requires_grad for param in policy.parameters()):
        return False
    pairs = zip(policy.parameters(), reference.parameters(), strict=True)
    return all(torch.equal(own, frozen.to(own.device)) for own, frozen in pairs)
