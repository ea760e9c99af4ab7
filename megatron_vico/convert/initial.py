"""Initial weights for modules missing from a checkpoint.

connector_16x and ViR at a ViCO start, connector_4x between an InternViT and a Qwen3 that were
trained apart. Each tensor is drawn from a generator of its own, seeded from (seed, its name): the
same values whatever is drawn before it, in one process or in several. The distributions are those
that torch gives the modules of models/connector.py and models/vir.py when they are built.
"""

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

Shape = tuple[int, ...]

CONNECTOR_16X_AND_VIR = ("encoder.connector_16x.", "encoder.vir.")
"""What only the Flash form of InternVL3.5 has."""

CONNECTOR_4X = "encoder.connector_4x."
"""What a vision tower and a language model from different checkpoints lack."""


def initial_tensor(name: str, *, shapes: Mapping[str, Shape], seed: int) -> Tensor:
    """The value that a tensor of a connector or of ViR starts with, float32.

    Norms: weight 1, bias 0. Linear layers: weight and bias uniform within 1 / sqrt(inputs).
    Attention's in_proj_weight: uniform within sqrt(6 / (rows + columns)), its biases 0. The query
    token: standard normal. `shapes` has that of the weight beside it too where it is a bias.
    """
    shape = shapes[name]
    kind = name.rpartition(".")[2]
    weight_shape = shapes[name.removesuffix("bias") + "weight"] if kind == "bias" else shape
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    values = torch.empty(shape)
    if kind == "query_token":
        return values.normal_(generator=generator)
    if len(weight_shape) == 1:
        return values.fill_(1.0 if kind == "weight" else 0.0)
    if kind == "in_proj_bias" or name.endswith("out_proj.bias"):
        return values.zero_()
    bound = (
        math.sqrt(6 / sum(shape)) if kind == "in_proj_weight" else 1 / math.sqrt(weight_shape[1])
    )
    return values.uniform_(-bound, bound, generator=generator)
