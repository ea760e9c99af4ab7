"""What one GPU has to show; without one, each check runs in a small form. The first of three files.

The small form shows that a check works and that its reference agrees with itself; it says nothing
of a GPU. `python -m tests.gpu` runs them with a line each, `test_gpu.py` under pytest. A check
returns its figures by what they are, and raises where one is wrong.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vico.config.registry import ModelConfig, get_model_config
from megatron_vico.config.schema import ParallelOptions, RunConfig, TrainingOptions
from tests.gpu.machine import Figures, Machine

FP8_MAX = 448.0
"""The largest float8_e4m3fn."""

BF16 = TrainingOptions(bf16=True)
FULL_RECOMPUTE: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def versions(machine: Machine) -> Figures:
    """What is installed; on a GPU TransformerEngine must be there and used."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.optimizer import Adam

    from megatron_vico.config.gpus import compiler_trouble
    from megatron_vico.cpu_stand_in import engine_trouble
    from megatron_vico.models.build import transformer_engine_usable

    found: Figures = {"Adam": Adam.__module__, "cuDNN": str(torch.backends.cudnn.version())}
    if machine.on_gpu:
        trouble = compiler_trouble()
        assert trouble is None, trouble
        engine = engine_trouble()
        assert engine is None, f"TransformerEngine cannot be imported: {engine.reason}"
        assert transformer_engine.HAVE_TE, "megatron-core finds no TransformerEngine"
        assert transformer_engine_usable()
    return found


def groups(machine: Machine) -> Figures:
    """The collectives that the project uses, empty tensors and objects too, on a group of one."""
    dist, device = torch.distributed, machine.device
    replica, data_parallel = machine.groups.replica, machine.groups.data_parallel
    total = torch.ones((), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    dist.broadcast(torch.empty(0, device=device), group=replica, group_src=0)
    empty = torch.empty(0, 8, device=device)
    dist.all_to_all_single(torch.empty_like(empty), empty, [0], [0], group=replica)
    dist.all_gather([torch.empty_like(empty)], empty, group=data_parallel)
    sent: list[Any] = [{"a": 1}]
    dist.broadcast_object_list(sent, group=replica, group_src=0, device=device)
    gathered: list[Any] = [None]
    dist.all_gather_object(gathered, {"b": 2})
    dist.barrier()
    assert (float(total), sent, gathered) == (1.0, [{"a": 1}], [{"b": 2}])
    return {"backend": dist.get_backend()}


def wide_product(machine: Machine) -> Figures:
    """bf16 matrices into float32 logits and onto a float32 gradient, as vocabulary heads do."""
    from megatron_vico.models.heads.vocabulary import (
        _add_weight_gradient,
        _rows_gradient,
        logits_of,
    )

    rows, weight = machine.normal(64, 96, seed=1), machine.normal(160, 96, seed=2)
    logits = logits_of(rows, weight)
    error = float((logits.double() - rows.double() @ weight.double().T).abs().max())
    assert logits.dtype == torch.float32
    assert error < 1e-3, error
    assert logits_of(rows[:0], weight).shape == (0, 160)
    grad = machine.normal(64, 160, seed=3)
    grad = grad if machine.on_gpu else grad.float()  # whose products then are float32 too
    total = torch.ones(160, 96, device=machine.device)
    _add_weight_gradient(total, grad, rows)
    added = float((total.double() - 1 - grad.double().T @ rows.double()).abs().max())
    assert added < 1e-3, added
    assert not _rows_gradient(grad[:, :0], weight[:0]).any(), "a rank with nothing but padding"
    return {"largest error": error, "largest error of what is added": added}


def layers(machine: Machine) -> Figures:
    """TransformerEngine's layers against torch's: same weights, packed documents, bf16."""
    found: Figures = {}
    # In bf16 a token may go to another expert.
    for size, limit in (("toy", 3e-2), ("toy-moe", 1e-1)):
        expected, found_here = (
            _layer_results(machine, get_model_config(size), attention)
            for attention in ("sdpa", "auto")
        )
        for what, reference in expected.items():
            error = float((found_here[what] - reference).norm() / reference.norm())
            assert error < limit, f"{size}: {what} differs by {error:.1e}, at most {limit:.0e}"
            found[f"{size} {what}, relative error"] = error
    return found


def stages(machine: Machine) -> Figures:
    """All four stages in bf16, each saved half-way and resumed, one started from the other."""
    from megatron_vico.training.trainer import train
    from tests.training_runs import make_toy_data, read_metrics, toy_config

    steps = 4 if machine.on_gpu else 2
    found: Figures = {}
    with tempfile.TemporaryDirectory(prefix="gpu_stages") as folder:
        root = Path(folder)
        data = make_toy_data(root / "data")
        for stage, starts_from, options in (
            ("pretrain", None, {}),
            ("warmup", "pretrain", FULL_RECOMPUTE),
            ("consistency", "warmup", FULL_RECOMPUTE | {"use_distributed_optimizer": True}),
            ("router", "consistency", {"reference_load": str(root / "warmup")}),
        ):
            run = str(root / stage)
            options = options | {"save": run, "load": run, "bf16": True, "train_iters": steps}
            if starts_from is not None:
                options["pretrained_checkpoint"] = str(root / starts_from)
            workers = 2 if machine.on_gpu else 0
            start = time.perf_counter()
            train(toy_config(data, stage, exit_interval=steps // 2, num_workers=workers, **options))
            train(toy_config(data, stage, **options))
            losses = [line["loss"] for line in read_metrics(root / stage)]
            assert len(losses) == steps
            assert all(map(torch.isfinite, torch.tensor(losses))), losses
            found[f"{stage} losses"] = " ".join(f"{loss:.4f}" for loss in losses)
            found[f"{stage} s"] = time.perf_counter() - start
    return found


def width(machine: Machine) -> Figures:
    """Four layers of 8B's width on a 32K pack, trained and frozen, with recompute and without."""
    model = get_model_config("internvl3_5-8b" if machine.on_gpu else "toy")
    language = dataclasses.replace(model.language, num_layers=4)
    model = dataclasses.replace(model, language=language)
    document_lens = (12288, 9216, 7168, 4096) if machine.on_gpu else (96, 64)
    found: Figures = {}
    for trained, recompute in ((True, False), (True, True), (False, True), (False, False)):
        step = _language_step(machine, model, document_lens, trained=trained, recompute=recompute)
        name = f"{'trained' if trained else 'frozen'}{' recomputed' if recompute else ''}"
        found[f"{name} ms"] = machine.milliseconds(step)
        found[f"{name} GB"] = machine.peak_gb(step)
        del step
        torch.cuda.empty_cache()
    return found


def vision(machine: Machine) -> Figures:
    """Sixteen tiles through four layers of each tower: time a layer, and the longest kernels."""
    from megatron_vico.models.build import build_vision_encoder, vision_transformer_config

    found: Figures = {}
    for size in ("internvl3_5-8b", "internvl3_5-38b") if machine.on_gpu else ("toy",):
        model = get_model_config(size)
        model = dataclasses.replace(model, vision=dataclasses.replace(model.vision, num_layers=4))
        config = vision_transformer_config(model, bf16=True)
        encoder = build_vision_encoder(model, config, pg_collection=machine.groups.encoder)
        encoder = encoder.to(machine.device, torch.bfloat16).eval()
        pixels = model.vision.image_size
        tiles = torch.zeros(16, 3, pixels, pixels, dtype=torch.uint8, device=machine.device)

        def forward(encoder: Any = encoder, tiles: Tensor = tiles) -> Tensor:
            with torch.no_grad():
                return encoder.features(encoder.normalise(tiles))

        assert bool(forward().isfinite().all())
        found[f"{size} ms a layer"] = machine.milliseconds(forward) / 4
        for kernel, milliseconds in _longest_kernels(forward) if machine.on_gpu else ():
            found[f"{size} {kernel} ms a layer"] = milliseconds
        del encoder, forward
        torch.cuda.empty_cache()
    return found


def fp8(machine: Machine) -> Figures:
    """TransformerEngine's FP8 linear layer, held to twice the error of rounding by hand."""
    rows, width, outputs = (8192, 4096, 12288) if machine.on_gpu else (64, 128, 96)
    inputs = machine.normal(rows, width, seed=1)
    weight = (machine.normal(outputs, width, seed=2).float() * width**-0.5).bfloat16()
    exact = inputs.float() @ weight.float().T
    expected = _relative(_rounded_to_fp8(inputs) @ _rounded_to_fp8(weight).T, exact)
    assert 0.01 < expected < 0.06, expected
    found: Figures = {"rounded by hand, relative error": expected}
    if not machine.on_gpu:
        return found
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling

    for recipe in (Float8CurrentScaling(), Float8BlockScaling()):
        linear = te.Linear(width, outputs, bias=False, params_dtype=torch.bfloat16, device="cuda")
        linear.weight.data.copy_(weight)
        wanted = inputs.clone().requires_grad_()
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            output = linear(wanted)
        output.backward(torch.ones_like(output))
        error = _relative(output, exact)
        assert error < 2 * expected, f"{type(recipe).__name__} {error:.3f}"
        assert bool(linear.weight.grad.isfinite().all())
        assert bool(wanted.grad.isfinite().all())
        found[f"{type(recipe).__name__}, relative error"] = error
    return found


def offload(machine: Machine) -> Figures:
    """Frozen weights to page-locked host memory and back, unchanged; on a GPU how fast."""
    from megatron_vico.training.offload import HostOffload

    shape, count = ((4096, 12288), 20) if machine.on_gpu else ((64, 64), 2)
    params = [
        torch.nn.Parameter(machine.normal(*shape, seed=seed), requires_grad=False)
        for seed in range(count)
    ]
    before = [float(param.float().sum()) for param in params]
    # With its number, as process groups name it.
    host = HostOffload(params, machine.groups.device)
    assert all(param.device.type == "cpu" for param in params)
    assert not machine.on_gpu or all(param.is_pinned() for param in params)

    def there_and_back() -> None:
        host.ready()
        host.release()

    milliseconds = machine.milliseconds(there_and_back)
    host.ready()
    assert [float(param.float().sum()) for param in params] == before
    num_bytes = sum(param.nbytes for param in params)
    return {"GB/s": num_bytes / milliseconds / 1e6} if machine.on_gpu else {"weights": count}


def _layer_results(machine: Machine, model: ModelConfig, attention: Any) -> dict[str, Tensor]:
    """Hidden states and gradients of a model whose weights depend on their names alone."""
    from megatron_vico.models.build import build_language_model, language_transformer_config
    from tests.toy_models import pack

    config = language_transformer_config(model, RunConfig(training=BF16))
    language_model = build_language_model(
        model, config, pg_collection=machine.groups.language, attention=attention
    ).to(machine.device, torch.bfloat16)
    params = {
        _engine_name(name, dense=model.language.num_experts is None): param
        for name, param in language_model.named_parameters()
    }
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, param in sorted(params.items()):
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(noise / param.shape[-1] ** 0.5 if param.dim() > 1 else 1 + 0.2 * noise)
    positions = [3 * index for index in range(20)]
    inputs = pack((70, 3, 129, 54), visual_positions=positions, device=machine.device)
    visual_tokens = machine.normal(20, model.language.hidden_size, seed=3).requires_grad_()
    rows = language_model(inputs, visual_tokens)
    rows.backward(machine.normal(*rows.shape, seed=4))
    weight = params["gpt.decoder.layers.0.self_attention.linear_qkv.weight"]
    results = {"rows": rows, "visual gradient": visual_tokens.grad, "weight gradient": weight.grad}
    return {what: tensor.detach().float() for what, tensor in results.items()}


def _engine_name(name: str, *, dense: bool) -> str:
    """There a norm is part of the linear layer behind it, except before experts."""
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    return name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_") if dense else name


def _language_step(
    machine: Machine,
    model: ModelConfig,
    document_lens: tuple[int, ...],
    *,
    trained: bool,
    recompute: bool,
) -> Callable[[], None]:
    from megatron_vico.models.build import build_language_model, language_transformer_config
    from tests.toy_models import pack

    layout = ParallelOptions(**FULL_RECOMPUTE) if recompute else ParallelOptions()
    config = language_transformer_config(model, RunConfig(training=BF16, parallel=layout))
    language_model = build_language_model(model, config, pg_collection=machine.groups.language)
    language_model = language_model.to(machine.device, torch.bfloat16)
    language_model.requires_grad_(trained).train(trained)
    inputs = pack(
        document_lens,
        visual_positions=range(8),
        response_rows=range(sum(document_lens) // 8),
        device=machine.device,
    )
    visual_tokens = machine.normal(8, model.language.hidden_size).requires_grad_()

    def step() -> None:
        rows = language_model(inputs, visual_tokens)
        rows.backward(torch.ones_like(rows))
        assert visual_tokens.grad is not None
        language_model.zero_grad(set_to_none=True)
        visual_tokens.grad = None

    return step


def _relative(found: Any, exact: Any) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def _rounded_to_fp8(tensor: Tensor) -> Tensor:
    """Each number as float8_e4m3fn keeps it, with one scale for all."""
    scale = FP8_MAX / tensor.float().abs().max()
    return (tensor.float() * scale).to(torch.float8_e4m3fn).float() / scale


def _longest_kernels(forward: Callable[[], object], *, limit: int = 6) -> list[tuple[str, float]]:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        forward()
    kernels = sorted(profile.key_averages(), key=lambda kernel: -kernel.device_time_total)
    return [(kernel.key[:40], kernel.device_time_total / 4e3) for kernel in kernels[:limit]]
