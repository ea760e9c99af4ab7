"""How many kernels the vision tower's elementwise functions compile to: FORWARD AND-BACKWARD each.

In a process of its own, for the CPU stand-in leaves functions uncompiled.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor import cpu_vec_isa, metrics
from torch._inductor.async_compile import AsyncCompile

from megatron_vico.models import layers


def kernels(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> str:
    """Of the forward pass alone, and with the backward pass."""
    metrics.reset()
    output = function(*(torch.randn(shape, requires_grad=True) for shape in shapes))
    forward = metrics.generated_kernel_count
    output.sum().backward()
    return f"{forward} {metrics.generated_kernel_count}"


if __name__ == "__main__":
    # A kernel counts when it is written: no compiler is asked, for it or what this CPU can do.
    cpu_vec_isa.valid_vec_isa_list = list
    AsyncCompile.cpp_pybinding = lambda self, argtypes, source: lambda *args: None
    print(kernels(layers.bias_gelu, (3, 5, 16), (16,)))
    print(kernels(layers.scaled_add, (3, 5, 16), (16,), (16,), (3, 5, 16)))
