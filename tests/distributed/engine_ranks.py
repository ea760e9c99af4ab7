"""Answers of an engine whose language model two ranks share, and of its twin on one."""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_vico.checkpoint.run_folder import iteration_folder, metadata_of
from megatron_vico.checkpoint.training_checkpoint import save_checkpoint
from megatron_vico.config.registry import get_model_config
from megatron_vico.config.schema import ParallelOptions
from megatron_vico.convert.modules import canonical_state
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece
from megatron_vico.inference.engine import Engine
from megatron_vico.inference.loading import build_engine, load_weights
from megatron_vico.inference.plans import Prompt, Routing
from megatron_vico.inference.pruning import PUBLISHED, Pruning
from megatron_vico.inference.sampling import Sampling
from megatron_vico.inference.server.engine_thread import EngineThread
from tests.distributed.cached_layouts import CachedLayouts
from tests.hf_exports import export_hf
from tests.toy_models import randomise
from tests.unit.inference.test_engine import conversation

SAMPLING = {"greedy": Sampling(), "drawn": Sampling(temperature=0.7, top_p=0.9, seed=3)}


def found_answers(folder: str) -> dict[str, Any]:
    """Texts, by the number of ranks and the way they are chosen; the same on every rank."""
    layouts, found = CachedLayouts(), dict[str, Any]()
    for size in ("toy", "toy-moe"):
        for num_ranks in (1, 2):
            groups = layouts.switch_to(ParallelOptions(tensor_model_parallel_size=num_ranks))
            engine = _engine(size, groups, Path(folder))
            checkpoint, flash = Path(folder) / size, Path(folder) / f"{size}-flash"
            if num_ranks == 1:
                randomise(engine.encoder, seed=0)
                randomise(engine.language_model, seed=1)
                modules = {"encoder": engine.encoder, "language_model": engine.language_model}
                metadata = metadata_of(engine.model, stage="router")
                save_checkpoint(iteration_folder(checkpoint, 1), modules=modules, metadata=metadata)
                if torch.distributed.get_rank() == 0:
                    export_hf(flash, **modules, model=engine.model, layout="flash")
                torch.distributed.barrier()
            else:
                load_weights(engine, flash)
                state = canonical_state({"language_model": engine.language_model})
                exported = {name: tensor.clone() for name, tensor in state.items()}
                load_weights(engine, checkpoint)
                found[f"{size} differ"] = [
                    name for name in state if not torch.equal(state[name], exported[name])
                ]
            prompts = [engine.prompt(conversation(index)) for index in range(8)]
            for name, sampling in SAMPLING.items():
                answers = engine.answer(
                    prompts, plan=Routing(), max_new_tokens=12, sampling=sampling
                )
                found[f"{size} {name} {num_ranks}"] = [each.token_ids for each in answers]
            for rule in PUBLISHED:
                plan = Pruning(rule=rule, num_layers=engine.model.language.num_layers)
                answers = engine.answer(prompts, plan=plan, max_new_tokens=12)
                found[f"{size} {rule} {num_ranks}"] = [each.token_ids for each in answers]
            if num_ranks == 2:
                found[f"{size} served"] = _served(engine, prompts)
    return found


def _served(engine: Engine, prompts: Sequence[Prompt]) -> list[Any]:
    """The same as `greedy`, asked of the first rank at once; one client goes away early."""
    thread = EngineThread(engine)
    if not engine.is_main:
        thread.follow()
        return []

    async def ask(prompt: Prompt) -> Any:
        sampling = Sampling(max_new_tokens=12)
        async for request in thread.run(prompt, Routing(), sampling):
            answers = tuple(tuple(answer.ids) for answer in request.answers)
        return answers

    async def ask_all() -> list[Any]:
        async with asyncio.timeout(60):
            endless = Sampling(max_new_tokens=300, ignore_eos=True)
            gone = thread.run(prompts[0], "none", endless)
            await anext(gone)
            answers = asyncio.gather(*map(ask, prompts))
            await gone.aclose()
            return await answers

    thread.start()
    answers = asyncio.run(ask_all())
    thread.stop()
    return answers


def _engine(size: str, groups: Any, folder: Path) -> Engine:
    with tempfile.TemporaryDirectory() as own:
        path = train_sentencepiece(
            ["What is it? And now? Yes, no."] * 50, model_prefix=Path(own) / "t", vocab_size=320
        )
        tokenizer = load_tokenizer(path)
    torch.manual_seed(0)
    return build_engine(
        get_model_config(size),
        groups=groups,
        tokenizer=tokenizer,
        settings=EncodingSettings(image_size=32, max_dynamic_patch=4),
        batch_size=3,
    )
