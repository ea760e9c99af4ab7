"""Whole weights from the parts that the ranks of a layout hold, and back; apart from
megatron-core's own checkpoints.

A whole weight's name has the number of its layer and of its expert in the whole model. Its rows end
with the real vocabulary, where they are one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_vico.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank holds of a weight."""

    name: str
    """Of the whole weight."""

    param: nn.Parameter | None
    """The part itself; None where another rank has it."""

    part_shape: torch.Size

    index: int
    """Which of the parts, from 0."""

    num_parts: int

    dim: int
    """Where the weight is cut."""

    num_rows: int | None
    """Rows of the whole weight, where padding may follow them."""

    is_first: bool
    """Whether, of the ranks that hold this part and sum its gradient, this is the first."""

    @property
    def shape(self) -> list[int]:
        """Of the whole weight, without padding."""
        shape = list(self.part_shape)
        shape[self.dim] *= self.num_parts
        if self.num_rows is not None:
            shape[0] = self.num_rows
        return shape

    @property
    def blocks(self) -> int:
        """Matrices stacked in the weight that are cut each for itself: gate and up of an MLP."""
        return 2 if "language_model" in self.name and "linear_fc1.weight" in self.name else 1

    def cut(self, whole: Tensor) -> Tensor:
        """This part of a whole weight; zeros in padding."""
        if self.num_rows is not None:
            padding = self.part_shape[0] * self.num_parts - len(whole)
            whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
        blocks = whole.chunk(self.blocks, dim=self.dim)
        return torch.cat(
            [block.chunk(self.num_parts, dim=self.dim)[self.index] for block in blocks],
            dim=self.dim,
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole weight from all its parts."""
        blocks = zip(*(part.chunk(self.blocks, dim=self.dim) for part in parts), strict=True)
        whole = torch.cat([torch.cat(block, dim=self.dim) for block in blocks], dim=self.dim)
        return whole if self.num_rows is None else whole[: self.num_rows]


def parts_of(modules: Mapping[str, Sequence[nn.Module]], groups: Groups) -> Iterator[Part]:
    """What this rank holds of every weight of `encoder` and `language_model`, each its chunks here,
    outside of DDP; `groups` are those they were built in."""
    for module_name, chunks in modules.items():
        for chunk in chunks:
            for name, param in chunk.named_parameters():
                is_expert = ".experts." in name
                if module_name == "encoder":
                    split, replicas = groups.encoder.tp, groups.encoder.dp_cp
                elif is_expert:
                    split, replicas = groups.language.expt_tp, groups.language.expt_dp
                else:
                    split, replicas = groups.language.tp, groups.language.dp_cp
                is_cut = getattr(param, "tensor_model_parallel", False)
                has_vocabulary = "word_embeddings" in name or "output_layer" in name
                yield Part(
                    name=f"{module_name}.{_in_whole_model(name, chunk, groups)}",
                    param=param,
                    part_shape=param.shape,
                    index=split.rank() if is_cut else 0,
                    num_parts=split.size() if is_cut else 1,
                    dim=param.partition_dim if is_cut else 0,
                    num_rows=chunk.language.vocab_size if has_vocabulary else None,
                    is_first=replicas.rank() == 0,
                )


def gather_weights(modules: Mapping[str, Sequence[nn.Module]], groups: Groups) -> dict[str, Tensor]:
    """All whole weights, by name in the whole model, on every rank; fails where two ranks hold
    different copies of a part."""
    own = list(parts_of(modules, groups))
    # One tensor a rank: pickled one by one, they take seconds.
    flat = torch.cat([part.param.detach().flatten() for part in own])
    everyones: list[tuple[list[Part], Tensor]] = [([], flat)] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(
        everyones, ([replace(part, param=None) for part in own], flat)
    )
    found: dict[str, dict[int, Tensor]] = {}
    described: dict[str, Part] = {}
    for parts, tensors in everyones:
        assert torch.isfinite(tensors).all()
        sizes = [part.part_shape.numel() for part in parts]
        for part, piece in zip(parts, tensors.split(sizes), strict=True):
            described[part.name] = part
            known = found.setdefault(part.name, {}).setdefault(
                part.index, piece.view(part.part_shape)
            )
            assert torch.equal(known, piece.view(part.part_shape)), (
                f"ranks hold different copies of {part.name}"
            )
    return {
        name: described[name].join([parts[index] for index in sorted(parts)])
        for name, parts in found.items()
    }


def _in_whole_model(name: str, chunk: nn.Module, groups: Groups) -> str:
    name = _of_own_layers(name)
    layer = re.match(r"gpt\.decoder\.layers\.(\d+)\.", name)
    if layer is None:
        return name
    block = chunk.gpt.decoder.layers[int(layer[1])]
    expert = re.search(r"\.local_experts\.(\d+)\.", name)
    if expert is not None:
        first = groups.language.ep.rank() * block.mlp.num_local_experts
        name = name.replace(expert[0], f".local_experts.{first + int(expert[1])}.")
    return name.replace(layer[0], f"gpt.decoder.layers.{block.layer_number - 1}.")


def _of_own_layers(name: str) -> str:
    """A name of TransformerEngine's layers under that of megatron-core's own."""
    name = name.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.")
    name = name.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
    return re.sub(
        r"\.experts\.(linear_fc\d)\.weight(\d+)$", r".experts.local_experts.\2.\1.weight", name
    )
