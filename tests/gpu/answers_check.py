"""Answers on a GPU: fused attention alone, one wait a token, and how long it takes."""

import dataclasses
import io
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_vico.config.registry import ModelConfig, get_model_config
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.inference.engine import Engine
from megatron_vico.inference.loading import build_engine
from megatron_vico.inference.plans import Routing
from megatron_vico.inference.sampling import Sampling
from megatron_vico.inference.scheduler import Request, Scheduler
from tests.gpu.machine import Figures, Machine

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
REQUESTS, STEPS = 8, 8


def answers(machine: Machine) -> Figures:
    """Four layers of 8B's width and its ViT, router and connectors; requests of unequal length."""
    model = get_model_config("internvl3_5-8b" if machine.on_gpu else "toy")
    language = dataclasses.replace(model.language, num_layers=4)
    engine = _engine(machine, dataclasses.replace(model, language=language))
    scheduler = Scheduler(engine)
    sampling = Sampling(ignore_eos=True, max_new_tokens=4 * STEPS)
    requests = [
        Request(prompt=engine.prompt(_sample(number)), plan=Routing(), sampling=sampling)
        for number in range(REQUESTS)
    ]
    for request in requests:
        scheduler.add(request)
    # The kernel that keeps all scores is no choice on a GPU: without a fused one it is an error.
    with sdpa_kernel(FUSED if machine.on_gpu else [*FUSED, SDPBackend.MATH]):
        scheduler.step()
        assert len(scheduler.running) == REQUESTS, "all were read in one step"
        milliseconds = machine.milliseconds(scheduler.step)
        waits = machine.host_waits(lambda: [scheduler.step() for _ in range(STEPS)])
        while not scheduler.idle:
            scheduler.step()
    assert {len(each.answers[-1].ids) for each in requests} == {4 * STEPS}
    return {f"ms a token of {REQUESTS} answers": milliseconds, "host waits a token": waits / STEPS}


def _engine(machine: Machine, model: ModelConfig) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        words = ["What is it? And now? Yes, no. user assistant system"] * 50
        path = train_sentencepiece(words, model_prefix=Path(folder) / "toy", vocab_size=320)
        tokenizer = load_tokenizer(path)
    settings = EncodingSettings(image_size=model.vision.image_size, max_dynamic_patch=4)
    with torch.no_grad():
        return build_engine(
            model,
            groups=machine.groups,
            tokenizer=tokenizer,
            settings=settings,
            bf16=True,
            batch_size=REQUESTS,
        )


def _sample(number: int) -> ConversationSample:
    """A question, longer each time; every second is about an image."""
    question, images = "And now? " * (1 + number), ()
    if number % 2:
        file = io.BytesIO()
        Image.new("RGB", (64, 32), (40 * number % 256, 9, 90)).save(file, "png")
        question, images = f"<image>\n{question}", (file.getvalue(),)
    return ConversationSample(key=f"{number}", turns=(Turn("human", question),), images=images)
