"""The engine equals the naive way: one conversation at a time, all of its text for every token."""

import io

import numpy as np
import pytest
import torch
from megatron.core import tensor_parallel
from PIL import Image

from megatron_vico.config.registry import get_model_config
from megatron_vico.data.encode.expand import expand
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.errors import SampleError
from megatron_vico.inference.engine import Engine, Routing
from megatron_vico.models.build import (
    build_language_model,
    build_vision_encoder,
    language_transformer_config,
    vision_transformer_config,
)
from megatron_vico.models.language_model import LanguageInputs
from megatron_vico.vico.compression_plan import plan_random_exact

MAX_NEW_TOKENS = 5
SHAPES = [(64, 64), (32, 32), (96, 32), None, (32, 64)]


@pytest.fixture(scope="module")
def engine(single_process_groups, tmp_path_factory):
    # Weights come from megatron-core's own random state, which other tests move.
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(0)
    path = train_sentencepiece(
        ["What is it? And now? Yes, no, two tiles. user assistant system"] * 50,
        model_prefix=tmp_path_factory.mktemp("tokenizer") / "toy",
        vocab_size=320,
    )
    tokenizer = load_tokenizer(path)
    model = get_model_config("toy")
    language_model = build_language_model(
        model, language_transformer_config(model), attention="sdpa"
    )
    encoder = build_vision_encoder(model, vision_transformer_config(model))
    with torch.no_grad():
        # Fresh weights hardly react to the image, nor ever stop: make visual tokens loud and the
        # end mark likely.
        encoder.connector_4x.linear_2.weight.mul_(30)
        encoder.connector_16x.linear_3.weight.mul_(30)
        language_model.gpt.output_layer.weight[tokenizer.eos_id].mul_(2.5)
        # Likewise the router: its head decides by what it sees, and not by its bias alone.
        encoder.vir.gating.gate[1].weight.mul_(20)
    return Engine(
        encoder=encoder,
        language_model=language_model,
        tokenizer=tokenizer,
        model=model,
        settings=EncodingSettings(
            image_size=32, max_dynamic_patch=4, use_thumbnail=True, tile_tags="numbered"
        ),
        batch_size=3,
    )


def conversation(index, num_questions=None):
    rng = np.random.default_rng(index)
    shape = SHAPES[index % len(SHAPES)]
    images = ()
    if shape is not None:
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "png")
        images = (file.getvalue(),)
    turns = [Turn("system", "Yes, no.")]
    for number in range(1 + index % 3 if num_questions is None else num_questions):
        text = "What is it?" if number == 0 else "And now? " * number
        turns += [
            Turn("human", ("<image>\n" if images and number == 0 else "") + text),
            Turn("gpt", "two"),
        ]
    return ConversationSample(key=f"c{index}", turns=tuple(turns), images=images)


def features_of(engine, prompt):
    tiles = torch.from_numpy(prompt.first.tiles)
    return engine.encoder.features(engine.encoder.normalise(tiles))


@torch.no_grad()
def naive_answers(engine, prompt, plan):
    """Every token from a full pass over everything said so far, through the packed path that
    training uses."""
    tokenizer, model = engine.tokenizer, engine.model
    stream = expand([prompt.first], plan=plan, tokens_kept=4, tokens_compressed=1, image_token_id=5)
    visual = engine.encoder.visual_tokens(features_of(engine, prompt), plan)
    ids, answers = stream.token_ids.tolist(), []
    for follow_up in [None, *prompt.follow_ups]:
        if follow_up is not None:
            ids += [tokenizer.eos_id, *follow_up.tolist()]
        answer = []
        while len(answer) < MAX_NEW_TOKENS:
            inputs = LanguageInputs(
                token_ids_T=torch.tensor(ids),
                visual_positions_V=stream.visual_positions,
                cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
                document_lens=(len(ids),),
                response_rows_R=torch.tensor([len(ids) - 1]),
                shard_len=len(ids),
            )
            hidden = engine.language_model(inputs, visual)
            logits = engine.language_model.response_logits(hidden)
            token = int(logits[:, : tokenizer.vocab_size].argmax())
            assert logits.shape == (1, model.language.vocab_size)
            if token == tokenizer.eos_id:
                break
            answer.append(token)
            ids.append(token)
        answers.append(answer)
    return answers


def plan_of(prompt, num_compressed, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return plan_random_exact(
        prompt.first.num_tiles, min(num_compressed, prompt.first.num_tiles), generator=generator
    )


def test_batched_answers_with_cache_equal_naive_ones(engine):
    prompts = [engine.prompt(conversation(index)) for index in range(10)]
    plans = [plan_of(prompt, index % 4, seed=index) for index, prompt in enumerate(prompts)]
    answers = list(engine.answer(prompts, plan=plans, max_new_tokens=MAX_NEW_TOKENS))
    lens = []
    for prompt, plan, found in zip(prompts, plans, answers, strict=True):
        expected = naive_answers(engine, prompt, plan)
        assert found.texts == tuple(engine.tokenizer.decode(ids) for ids in expected)
        assert torch.equal(found.compressed_N, plan)
        assert found.probability_N is None
        assert found.num_visual_tokens == 4 * prompt.first.num_tiles - 3 * int(plan.sum())
        lens += [len(ids) for ids in expected]
    # The test is about unequal ends: some answers stop at once, some on the way, some are cut off.
    assert 0 in lens
    assert MAX_NEW_TOKENS in lens
    assert set(lens) - {0, MAX_NEW_TOKENS}


def test_answers_depend_on_the_plan(engine):
    prompts = [engine.prompt(conversation(index, num_questions=3)) for index in range(0, 10, 5)]
    kept, compressed = (
        engine.answer(prompts, plan=plan, max_new_tokens=MAX_NEW_TOKENS) for plan in ("none", "all")
    )
    assert [answer.texts for answer in kept] != [answer.texts for answer in compressed]


@pytest.mark.parametrize("granularity", ["tile", "image"])
def test_router_decides_and_its_plan_is_used(engine, granularity):
    routing = Routing(granularity=granularity)
    prompts = [engine.prompt(conversation(index)) for index in range(10)]
    routed = engine.route(prompts, routing)
    answers = list(engine.answer(prompts, plan=routing, max_new_tokens=2))
    for prompt, (plan, probability), found in zip(prompts, routed, answers, strict=True):
        counts = None if granularity == "tile" else prompt.first.tiles_per_image
        with torch.no_grad():
            logits = engine.encoder.vir(features_of(engine, prompt), counts)
        expected = logits.softmax(-1)[:, 0]
        # Measured error 1.1e-6: batch sizes differ, and the head is 20 times as loud.
        torch.testing.assert_close(probability, expected, atol=1e-5, rtol=0)
        assert torch.equal(plan, probability > 0.5)
        assert torch.equal(found.compressed_N, plan)
        assert torch.equal(found.probability_N, probability)
    everything = torch.cat([plan for plan, _ in routed])
    assert 0 < int(everything.sum()) < len(everything)


def test_flash_rule_looks_at_one_conversation_at_a_time(engine):
    routing = Routing(rule="flash", relative_threshold=0.5, absolute_threshold=0.0)
    prompts = [engine.prompt(conversation(index)) for index in range(6)]
    for prompt, (plan, probability) in zip(prompts, engine.route(prompts, routing), strict=True):
        if prompt.first.num_tiles == 1:
            assert not plan.any()
        elif prompt.first.num_tiles:
            assert torch.equal(plan, probability > probability.quantile(0.5))


def test_nothing_is_kept_for_gradients(engine):
    prompts = [engine.prompt(conversation(0))]
    (answer,) = engine.answer(prompts, plan=Routing(), max_new_tokens=1)
    assert not answer.probability_N.requires_grad
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_errors_name_the_sample(engine):
    with pytest.raises(SampleError, match=r"'c0'.*no turn from 'human'"):
        engine.prompt(ConversationSample(key="c0", turns=(Turn("system", "Yes."),)))
    turns = (Turn("human", "What?"), Turn("gpt", "two"), Turn("human", "<image> And now?"))
    with pytest.raises(SampleError, match=r"'c1'.*after the first answer"):
        engine.prompt(ConversationSample(key="c1", turns=turns))
    prompt = engine.prompt(conversation(0))
    with pytest.raises(SampleError, match=r"'c0'.*plan for 3 tiles but 5"):
        list(engine.answer([prompt], plan=[torch.zeros(3, dtype=torch.bool)]))
