"""Lets megatron-core run where there is no GPU: in this process "cuda" then means "cpu" or "meta".

Installed by the entry points and the test fixtures, never at import of the package, and before the
first import of `megatron` (mcore decides some things while it is imported). Does nothing where CUDA
is available: on a GPU nothing is patched.
"""

import functools
import importlib
import importlib.util
import logging
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch.optim.adamw import adamw
from torch.utils import _device as torch_device

from megatron_vico.errors import ConfigError

_FACTORIES = (
    "empty zeros ones full tensor arange eye rand randn randint randperm linspace as_tensor"
    " empty_like zeros_like ones_like full_like rand_like randn_like"
)
_TENSOR_FACTORIES = "new_empty new_zeros new_ones new_full new_tensor"
_CUDA_DOES_NOTHING = (
    "set_device synchronize empty_cache reset_peak_memory_stats set_stream _lazy_init"
)
_CUDA_ZERO = (
    "current_device memory_allocated max_memory_allocated memory_reserved max_memory_reserved"
)
_CUDA_OBJECTS = "Stream Event device stream current_stream default_stream"


class _Nothing:
    """Stream, Event, device guard: every method does nothing and returns the object itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., "_Nothing"]:
        return lambda *args, **kwargs: self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class CPUAdam(torch.optim.Optimizer):
    """AdamW with TransformerEngine's state layout: one step count in each parameter group.

    megatron-core's DistributedOptimizer cannot load a checkpoint of torch's AdamW, which counts
    steps per parameter; with this layout a checkpoint written on a CPU also loads on a GPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **unused: Any,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay"
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": True,  # TransformerEngine's asks a group for it
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One AdamW update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param] = {
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
            adamw(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


@dataclass(frozen=True)
class EngineTrouble:
    """Why the TransformerEngine that is installed cannot be used."""

    reason: str
    is_fatal: bool
    """megatron-core goes without a package that lacks a module; any other error is its end too."""


def engine_trouble() -> EngineTrouble | None:
    """What keeps an installed TransformerEngine from being imported, if anything does."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a library's loader has many
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return EngineTrouble(reason, is_fatal=not isinstance(error, ModuleNotFoundError))
    return None


def install(device: Literal["cpu", "meta"] = "cpu") -> None:
    """Make this process run megatron-core without a GPU; does nothing where CUDA is available.

    Args:
        device: what "cuda" means. On "meta", where tensors have a size and no memory, a step runs
            without weights or data (planning/).

    Raises:
        ConfigError: if a broken TransformerEngine would end the import of megatron-core.
    """
    trouble = engine_trouble()
    if trouble is not None and trouble.is_fatal:
        raise ConfigError(
            f"megatron-core cannot be imported beside this TransformerEngine: {trouble.reason};"
            " install one that is built for this torch, or remove it (pip uninstall"
            " transformer-engine)."
        )
    if torch.cuda.is_available() or getattr(torch.cuda, "_vico_stand_in", False):
        return
    torch.cuda._vico_stand_in = True  # type: ignore[attr-defined]
    _redirect_tensors(device)
    _redirect_cuda_module()
    _redirect_rng()
    _redirect_collectives()
    if device == "meta":
        _redirect_p2p()
    # mcore's jit_fuser is torch.compile: on the CPU a C++ compiler, and seconds per function.
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda fn: fn)  # type: ignore[assignment]
    _install_adam()


def _instead(device: str, value: Any, *, index_is_device: bool) -> Any:
    if isinstance(value, (str, torch.device)):
        return device if str(value).partition(":")[0] == "cuda" else value
    return device if index_is_device and type(value) is int else value


def _factory(device: str, create: Callable[..., Any]) -> Callable[..., Any]:
    # Factories are wrapped one by one: a TorchFunctionMode would be off inside autograd's backward,
    # where sequence-parallel linear layers allocate.
    @functools.wraps(create)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _instead(device, kwargs["device"], index_is_device=True)
        kwargs.pop("pin_memory", None)
        return create(*args, **kwargs)

    return wrapped


def _redirect_tensors(device: str) -> None:
    tensor: Any = torch.Tensor
    # torch finds out once which functions `with torch.device(...)` reaches; it must find the real
    # ones, or transformers leaves the buffers of a model that it builds on "meta" without values.
    torch_device._device_constructors()
    for name in _FACTORIES.split():
        setattr(torch, name, _factory(device, getattr(torch, name)))
    for name in _TENSOR_FACTORIES.split():
        setattr(tensor, name, _factory(device, getattr(tensor, name)))
    move, type_name, instead = tensor.to, tensor.type, functools.partial(_instead, device)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = {
            name: instead(value, index_is_device=name == "device") for name, value in kwargs.items()
        }
        return move(self, *(instead(value, index_is_device=True) for value in args), **named)

    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        # mcore's optimizers compare this with "torch.cuda.FloatTensor".
        plain = type_name(self, *args, **kwargs)
        if args or kwargs:
            return plain
        return f"torch.cuda.{plain.rpartition('.')[2]}"

    tensor.to, tensor.type = to, type_
    tensor.pin_memory = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    tensor.cuda = module.cuda = lambda self, *args, **kwargs: self.to(device)


def _constant(value: Any = None) -> Callable[..., Any]:
    # A new function each time: torch._dynamo rejects one object under two names.
    return lambda *args, **kwargs: value


def _redirect_cuda_module() -> None:
    cuda: Any = torch.cuda
    for name in _CUDA_DOES_NOTHING.split():
        setattr(cuda, name, _constant())
    for name in _CUDA_ZERO.split():
        setattr(cuda, name, _constant(0))
    for name in _CUDA_OBJECTS.split():
        setattr(cuda, name, type(name, (_Nothing,), {}))
    cuda.device_count = _constant(1)
    cuda.memory_stats = _constant({})
    cuda.is_current_stream_capturing = _constant(False)
    cuda.get_device_capability = _constant((0, 0))
    cuda.get_device_properties = _constant(
        types.SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0)
    )
    cuda.nvtx.range_push, cuda.nvtx.range_pop, cuda.nvtx.range = _constant(), _constant(), _Nothing


def _redirect_rng() -> None:
    cuda: Any = torch.cuda
    cuda._lazy_call = lambda fn, **kwargs: fn()
    cuda.default_generators = (torch.default_generator,)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(
        state
    )
    # mcore warns that the CPU generator moved inside a CUDA one's context; here they are the same.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _redirect_collectives() -> None:
    # mcore makes split sizes plain numbers only for CUDA tensors.
    all_to_all = torch.distributed.all_to_all_single

    def plain(splits: Any) -> Any:
        return splits.tolist() if isinstance(splits, torch.Tensor) else splits

    def all_to_all_single(
        output: Any,
        tensor: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return all_to_all(
            output, tensor, plain(output_split_sizes), plain(input_split_sizes), *args, **kwargs
        )

    torch.distributed.all_to_all_single = all_to_all_single  # type: ignore[assignment]
    _allow_unequal_parts()


def _allow_unequal_parts() -> None:
    # NCCL gathers and scatters parts of unequal lengths, which experts over tensor-parallel ranks
    # have; gloo does not.
    all_gather, reduce_scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    def unequal_all_gather(
        outputs: list[Any], tensor: Any, group: Any = None, **kwargs: Any
    ) -> Any:
        if len({each.shape for each in outputs}) == 1:
            return all_gather(outputs, tensor, group=group, **kwargs)
        padded = tensor.new_zeros(max(len(each) for each in outputs), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in outputs]
        all_gather(gathered, padded, group=group)
        for output, part in zip(outputs, gathered, strict=True):
            output.copy_(part[: len(output)])
        return None

    def unequal_reduce_scatter(
        output: Any, inputs: list[Any], group: Any = None, **kwargs: Any
    ) -> Any:
        if len({each.shape for each in inputs}) == 1:
            return reduce_scatter(output, inputs, group=group, **kwargs)
        assert not kwargs
        whole = torch.cat(inputs)
        torch.distributed.all_reduce(whole, group=group)
        output.copy_(whole.split([len(each) for each in inputs])[torch.distributed.get_rank(group)])
        return None

    torch.distributed.all_gather = unequal_all_gather  # type: ignore[assignment]
    torch.distributed.reduce_scatter = unequal_reduce_scatter  # type: ignore[assignment]


def _redirect_p2p() -> None:
    # torch looks for a backend of the tensors' device, and "meta" has none; a list of calls is the
    # same to the receiver.
    def one_by_one(ops: list[torch.distributed.P2POp]) -> list[Any]:
        return [op.op(op.tensor, op.peer, group=op.group) for op in ops]

    torch.distributed.batch_isend_irecv = one_by_one  # type: ignore[assignment]


def _install_adam() -> None:
    with warnings.catch_warnings():
        # That there is no TransformerEngine or Apex is what this file is for; `vico doctor` says so
        # once.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core import optimizer
        from megatron.core.optimizer import distrib_optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distrib_optimizer.Adam = CPUAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
