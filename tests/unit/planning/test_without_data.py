"""What stands for torch's operators in a dry run, against torch."""

import itertools
from typing import Any

import pytest
import torch

from megatron_vico.planning.remembered import Remembered

aten = torch.ops.aten
MADE = [
    torch.empty(shape, dtype=dtype, device="meta")
    for shape in ((3, 1, 4), (4,), (3, 5, 4), ())
    for dtype in (torch.bfloat16, torch.float32)
]
MADE.append(torch.empty(4, 3, device="meta").T)
WITH_A_NUMBER = (aten.add.Scalar, aten.mul.Scalar, aten.pow.Tensor_Scalar, aten.pow.Scalar)
OPERATORS = (
    *(getattr(aten, name).Tensor for name in ("add", "mul", "div")),
    *(getattr(aten, name).default for name in ("rsqrt", "gelu", "mm", "clone", "var_mean")),
    *(aten.addcmul.default, *WITH_A_NUMBER),
)


def form(out: Any) -> Any:
    if isinstance(out, tuple):
        return [form(each) for each in out]
    return out.shape, out.stride(), out.dtype, out.untyped_storage().nbytes()


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_a_remembered_result_is_torchs(operator: Any) -> None:
    """All arguments with one memory, so that one combination could be taken for another."""
    call = Remembered()
    kinds = [argument.type.kind() for argument in operator._schema.arguments]
    numbers = (2, 2.0, True) if operator in WITH_A_NUMBER else (None,)
    tensors = list(itertools.product(MADE, repeat=kinds.count("TensorType")))
    for _, args, number in itertools.product(range(2), tensors, numbers):
        given = args if number is None else (*args, number)
        if operator is aten.pow.Scalar:
            given = given[::-1]
        try:
            expected = operator(*given)
        except RuntimeError:  # shapes or types that do not go together
            with pytest.raises(RuntimeError):
                call(operator, given, {})
            continue
        assert form(call(operator, given, {})) == form(expected)


def test_what_writes_gives_a_view_or_has_values_is_not_remembered() -> None:
    call = Remembered()
    a, b = torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta")
    for _ in range(2):
        assert call(aten.add_.Tensor, (a, b), {}) is a
        for view in (call(aten.t.default, (a,), {}), call(aten.view.default, (a, [6]), {})):
            assert view.untyped_storage()._cdata == a.untyped_storage()._cdata
        for value in (1.0, 2.0):
            assert call(aten.neg.default, (torch.tensor(value),), {}).item() == -value
