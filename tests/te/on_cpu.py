"""TransformerEngine's Python on a CPU: plain torch for its compiled module, a GPU to believe in.

The package on the index is pure Python; what it lacks are `transformer_engine_torch`
(tests/te/compiled.py) and the library that `transformer_engine.common` loads, which Python calls
for nothing else. To TransformerEngine, and where this project chooses layers, there is a Hopper
GPU; everything else sees the CPU.
"""

import dataclasses
import inspect
import os
import sys
import textwrap
import types
import warnings
from typing import Any

import torch

from megatron_vico import cpu_stand_in
from tests.te import compiled


def install() -> None:
    """Before the first import of megatron."""
    assert "megatron.core" not in sys.modules
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own switch: imported, but no library loaded
    os.environ["TRITON_INTERPRET"] = "1"  # its permutation of experts' tokens is in Triton
    _tune_no_kernel()
    sys.modules["transformer_engine_torch"] = compiled.module()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected a PyTorch installation")
        import transformer_engine
        from transformer_engine import common

        common.load_framework_extension = lambda framework: None
        import transformer_engine.pytorch
    transformer_engine.pytorch.cpp_extensions.__getattr__ = compiled.absent
    # It asks for CUDA 12.9, which this torch was not built with.
    transformer_engine.pytorch.quantization._FP8_BLOCK_SCALING_SUPPORT = (True, "")
    cpu_stand_in.install()  # imports megatron-core
    _pretend_to_be_a_gpu()
    _let_requests_be_awaited_twice()
    _gather_one_by_one()
    _draw_from_the_cpu()
    _let_fused_attention_take_fp32()


def _tune_no_kernel() -> None:
    import triton

    autotune = triton.autotune
    triton.autotune = lambda configs, **options: autotune(configs[:1], **options)


def _pretend_to_be_a_gpu() -> None:
    properties = types.SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132
    )
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda *args, **kwargs: properties
    cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    cuda.is_available = lambda: _called_from("transformer_engine", "megatron_vico.models")
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda self: _called_from("transformer_engine"))


def _called_from(*packages: str) -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith(packages)


def _let_requests_be_awaited_twice() -> None:
    # Ring attention waits for each of its requests two times, which gloo does not forgive.
    send_and_receive = torch.distributed.batch_isend_irecv

    class Once:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            if self.work is not None:
                self.work.wait()
            self.work = None

    torch.distributed.batch_isend_irecv = lambda ops: [Once(each) for each in send_and_receive(ops)]


def _gather_one_by_one() -> None:
    # gloo takes what is gathered together for tensors of one format: FP8's bytes and bf16 are not.
    from megatron.core.distributed import param_and_grad_buffer as buffers

    def gather(out: Any, part: Any, group: Any, async_op: bool) -> None:
        group._allgather_base(out, part).wait()

    buffers.dist_all_gather_func = gather


def _draw_from_the_cpu() -> None:
    # Its checkpoint, which megatron-core takes for layers in FP8, keeps the state of a GPU's.
    from transformer_engine.pytorch import distributed

    distributed._get_cuda_rng_state = lambda *args, **options: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **options: torch.set_rng_state(state)


def _let_fused_attention_take_fp32() -> None:
    # Its kernels have no fp32, plain torch has; in fp32 a comparison shows more than in bf16.
    from transformer_engine.pytorch.attention.dot_product_attention import backends, utils

    choose = utils.get_attention_backend
    utils.get_attention_backend = lambda params: choose(
        dataclasses.replace(params, qkv_dtype=torch.bfloat16)
    )
    source = textwrap.dedent(inspect.getsource(backends.FusedAttention.forward))
    formats = "x.dtype in [torch.float16, torch.bfloat16]"
    assert formats in source
    names = dict(vars(backends))
    exec(source.replace(formats, "x.dtype in [torch.float32, torch.bfloat16]"), names)
    backends.FusedAttention.forward = names["forward"]
