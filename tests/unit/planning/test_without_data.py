"""What stands for torch's operators in a dry run, against torch."""

import itertools
from typing import Any

import pytest
import torch

from megatron_vico.planning.without_data import SHAPED, _addmm, _elementwise, _layer_norm

MADE = [
    torch.empty(shape, dtype=dtype, device="meta")
    for shape in ((3, 1, 4), (4,), (3, 5, 4), ())
    for dtype in (torch.bfloat16, torch.float32)
]
MADE.append(torch.empty(4, 3, device="meta").T)
NUMBERS = ("aten.add.Scalar", "aten.mul.Scalar", "aten.pow.Tensor_Scalar")


@pytest.mark.parametrize("operator", SHAPED, ids=str)
def test_an_elementwise_result_is_torchs(operator: Any) -> None:
    kinds = [argument.type.kind() for argument in operator._schema.arguments]
    numbers = [2.0] * (str(operator) in NUMBERS)
    for tensors in itertools.product(MADE, repeat=kinds.count("TensorType")):
        try:
            expected = operator(*tensors, *numbers)
        except RuntimeError:  # shapes that do not go together
            with pytest.raises(RuntimeError):
                _elementwise(operator, *tensors, *numbers)
            continue
        found = _elementwise(operator, *tensors, *numbers)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_linear_layer_and_a_norm_are_torchs(dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((6, 4), (3, 4), (3,))
    )
    expected = [torch.addmm(bias, x, weight.T)]
    found = [_addmm(bias, x, weight.T)]
    x = x.view(2, 3, 4)
    expected += torch.ops.aten.native_layer_norm(x, [4], x[0, 0], x[0, 0], 1e-5)
    found += _layer_norm(x, [4], x[0, 0], x[0, 0], 1e-5)
    for own, theirs in zip(found, expected, strict=True):
        assert (own.shape, own.dtype) == (theirs.shape, theirs.dtype)
        assert own.stride() == theirs.stride()
