"""The engine equals the naive way: one conversation at a time, all of its text for every token."""

import io
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vico.data.encode.expand import expand
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import write_text
from megatron_vico.inference.plans import (
    Random,
    Routing,
    decisions,
    plan_of,
    read_plan,
    read_replay,
)
from megatron_vico.inference.sampling import Sampling
from megatron_vico.inference.scheduler import Request, Scheduler
from megatron_vico.models.language_model import LanguageInputs
from megatron_vico.vico.compression_plan import plan_random_exact
from tests.toy_models import make_engine

MAX_NEW_TOKENS = 5
SHAPES = [(64, 64), (32, 32), (96, 32), None, (32, 64)]


@pytest.fixture(scope="module")
def engine(single_process_groups, tmp_path_factory):
    return make_engine(tmp_path_factory.mktemp("tokenizer"), batch_size=3)


def image(index, shape):
    file = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def conversation(index, num_questions=None):
    """Up to three questions; every fourth has an image more in each later one."""
    shape = SHAPES[index % len(SHAPES)]
    images = [] if shape is None else [image(index, shape)]
    turns = [Turn("system", "Yes, no.")]
    for number in range(1 + index % 3 if num_questions is None else num_questions):
        text = "What is it?" if number == 0 else "And now? " * number
        tag = "<image>\n" if images and number == 0 else ""
        if number and index % 4 == 0:
            images.append(image(100 + index + number, (32, 64)))
            text = "Yes <image> no? " + text
        turns += [Turn("human", tag + text), Turn("gpt", "two")]
    return ConversationSample(key=f"c{index}", turns=tuple(turns), images=tuple(images))


def features_of(engine, part):
    tiles = torch.from_numpy(part.tiles)
    return engine.encoder.features(engine.encoder.normalise(tiles))


@torch.no_grad()
def naive_answers(engine, prompt, plan):
    """Every token from a full pass over everything said so far, through the packed path that
    training uses."""
    tokenizer, model = engine.tokenizer, engine.model
    ids, answers, visual, positions = [], [], [], []
    for part in prompt.parts:
        own, plan = plan[: part.num_tiles], plan[part.num_tiles :]
        counts = {"tokens_kept": 4, "tokens_compressed": 1, "image_token_id": 5}
        stream = expand([part], plan=own, **counts)
        ids += [tokenizer.eos_id] if ids else []
        positions.append(stream.visual_positions + len(ids))
        visual.append(engine.encoder.visual_tokens(features_of(engine, part), own))
        ids += stream.token_ids.tolist()
        answer = []
        while len(answer) < MAX_NEW_TOKENS:
            inputs = LanguageInputs(
                token_ids_T=torch.tensor(ids),
                visual_positions_V=torch.cat(positions),
                cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
                document_lens=(len(ids),),
                response_rows_R=torch.tensor([len(ids) - 1]),
                shard_len=len(ids),
            )
            hidden = engine.language_model(inputs, torch.cat(visual))
            logits = engine.language_model.response_logits(hidden)
            token = int(logits[:, : tokenizer.vocab_size].argmax())
            assert logits.shape == (1, model.language.vocab_size)
            if token == tokenizer.eos_id:
                break
            answer.append(token)
            ids.append(token)
        answers.append(tuple(answer))
    return tuple(answers)


def plans_of(prompts):
    found = []
    for index, prompt in enumerate(prompts):
        num_compressed = min(index % 4, prompt.num_tiles)
        generator = torch.Generator().manual_seed(index)
        found.append(plan_random_exact(prompt.num_tiles, num_compressed, generator=generator))
    return found


def test_batched_answers_with_cache_equal_naive_ones(engine):
    prompts = [engine.prompt(conversation(index)) for index in range(15)]
    plans = plans_of(prompts)
    answers = list(engine.answer(prompts, plan=plans, max_new_tokens=MAX_NEW_TOKENS))
    lens = []
    for prompt, plan, found in zip(prompts, plans, answers, strict=True):
        assert found.token_ids == naive_answers(engine, prompt, plan)
        assert found.texts == tuple(engine.tokenizer.decode(ids) for ids in found.token_ids)
        assert torch.equal(found.compressed_N, plan)
        assert found.probability_N is None
        assert found.num_visual_tokens == 4 * prompt.num_tiles - 3 * int(plan.sum())
        lens += [len(ids) for ids in found.token_ids]
    # The test is about unequal ends: some answers stop at once, some on the way, some are cut off.
    assert 0 in lens
    assert MAX_NEW_TOKENS in lens
    assert set(lens) - {0, MAX_NEW_TOKENS}
    assert any(part.num_tiles for prompt in prompts for part in prompt.parts[1:])


@pytest.mark.slow
def test_greedy_answers_do_not_depend_on_the_batch(engine):
    """Requests that join and leave at any step, in any order, say what they say alone."""
    prompts = [engine.prompt(conversation(index)) for index in range(15)]
    sampling = Sampling(max_new_tokens=9)

    def request(index):
        return Request(prompt=prompts[index], plan="none", sampling=sampling)

    def said(requests):
        return [[answer.ids for answer in request.answers] for request in requests]

    alone = []
    for index in range(15):
        scheduler, one = Scheduler(engine), request(index)
        scheduler.add(one)
        while not scheduler.idle:
            scheduler.step()
        alone.append(one)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        scheduler, order = Scheduler(engine), list(rng.permutation(15))
        together = {index: request(index) for index in order}
        victims = [request(0) for _ in range(5)]
        widths = set()
        while order or not scheduler.idle:
            for _ in range(rng.integers(0, 3)):
                if order:
                    scheduler.add(together[order.pop()])
            if victims and rng.random() < 0.3:
                scheduler.add(victims[-1])
                scheduler.step()
                scheduler.cancel(victims.pop())
            scheduler.step()
            widths.add(len(scheduler.running))
        assert said(together[index] for index in range(15)) == said(alone)
        assert {1, 2, 3} <= widths
        assert scheduler.cached_tokens == 0


def test_a_token_is_one_read_of_the_device(engine, monkeypatch):
    """Of all requests together."""
    scheduler, reads = Scheduler(engine), []
    monkeypatch.setattr(
        torch.Tensor,
        "tolist",
        lambda self, real=torch.Tensor.tolist: (reads.append(1), real(self))[1],
    )
    for index in (3, 8, 13):  # text only: plans are read once
        prompt = engine.prompt(conversation(index, num_questions=1))
        scheduler.add(Request(prompt=prompt, plan="none", sampling=Sampling(ignore_eos=True)))
    scheduler.step()
    reads.clear()
    for _ in range(5):
        scheduler.step()
    assert len(reads) == 2 * 5  # the tokens; and the lengths, which are on the host


def test_nothing_that_a_token_needs_waits_for_the_device(engine, monkeypatch):
    """What goes there is page-locked first (`to_device`): else a copy waits for what is queued."""
    penalty = Sampling(ignore_eos=True, repetition_penalty=1.3, temperature=0.7)
    scheduler, waits = Scheduler(engine), []
    for index, sampling in ((3, Sampling(ignore_eos=True)), (8, penalty)):
        prompt = engine.prompt(conversation(index, num_questions=1))
        scheduler.add(Request(prompt=prompt, plan="none", sampling=sampling))
    scheduler.step()

    def noted(real):
        def call(*args, **kwargs):
            caller = sys._getframe(1).f_globals["__name__"]
            named = any(isinstance(each, torch.device) for each in (*args, *kwargs.values()))
            if named and caller.startswith("megatron_vico."):
                waits.append(caller)
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(torch.Tensor, "to", noted(torch.Tensor.to))
    monkeypatch.setattr(torch, "tensor", noted(torch.tensor))
    for _ in range(3):
        scheduler.step()
    assert waits == []


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
        counts = None if granularity == "tile" else prompt.tiles_per_image
        with torch.no_grad():
            features = torch.cat([features_of(engine, part) for part in prompt.parts])
            logits = engine.encoder.vir(features, counts)
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
        if prompt.num_tiles == 1:
            assert not plan.any()
        elif prompt.num_tiles:
            assert torch.equal(plan, probability > probability.quantile(0.5))


def test_random_plans_have_their_share_and_are_the_images_own(engine):
    prompts = [engine.prompt(conversation(index, num_questions=1)) for index in range(0, 200, 5)]
    plans = [plan_of(Random(ratio=0.3), prompt) for prompt in prompts]
    again = [plan_of(Random(ratio=0.3), prompt) for prompt in reversed(prompts)]
    assert all(map(torch.equal, plans, reversed(again)))
    assert len({tuple(plan.tolist()) for plan in plans}) > 5
    share = torch.cat(plans).float().mean()  # of 200 tiles; 5 a conversation, rounded at random
    assert 0.25 < share < 0.35


def test_decisions_are_replayed_from_a_file(engine, tmp_path):
    prompts = [engine.prompt(conversation(index)) for index in range(10)]
    decided = list(engine.answer(prompts, plan=Routing(), max_new_tokens=1))
    lines = [
        f'{{"images": {decisions(prompt, answer.compressed_N)}}}'.replace("'", '"')
        for prompt, answer in zip(prompts, decided, strict=True)
    ]
    write_text(tmp_path / "plans.jsonl", "\n".join(lines))
    replay = read_plan("replay", routing=None, replay=read_replay(tmp_path / "plans.jsonl"))
    for answer, other in zip(
        decided, engine.answer(prompts, plan=replay, max_new_tokens=1), strict=True
    ):
        assert torch.equal(answer.compressed_N, other.compressed_N)
    fewer = replace(conversation(0), max_dynamic_patch=1)
    with pytest.raises(SampleError, match=r"'c0': image 1 \(1 tiles"):
        plan_of(replay, engine.prompt(fewer))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vir", "no trained router"),
        ("random", "share of tiles"),
        ("random=1.5", "share of tiles"),
        ("random=x", "share of tiles"),
        ("replay", "no decisions"),
        ("nothing", "unknown plan 'nothing'"),
    ],
)
def test_plans_that_are_none(name, message):
    with pytest.raises(ConfigError, match=message):
        read_plan(name, routing=None)


def test_nothing_is_kept_for_gradients(engine):
    prompts = [engine.prompt(conversation(0))]
    (answer,) = engine.answer(prompts, plan=Routing(), max_new_tokens=1)
    assert not answer.probability_N.requires_grad
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_given_answers_are_history(engine):
    sample = conversation(2)
    turns = sample.turns[:-1]
    (part,) = engine.prompt(replace(sample, turns=turns), history="given").parts
    text = engine.tokenizer.decode(part.token_ids)
    assert text.count("<|im_start|>assistant\ntwo<|im_end|>\n") == 2
    assert text.endswith("<|im_start|>assistant\n")


def test_errors_name_the_sample(engine):
    with pytest.raises(SampleError, match=r"'c0'.*no turn from 'human'"):
        engine.prompt(ConversationSample(key="c0", turns=(Turn("system", "Yes."),)))
    prompt = engine.prompt(conversation(0))
    with pytest.raises(SampleError, match=r"'c0'.*plan for 3 tiles but 5"):
        list(engine.answer([prompt], plan=[torch.zeros(3, dtype=torch.bool)]))


def test_a_conversation_ends_with_the_context(engine, monkeypatch):
    prompt = engine.prompt(conversation(3, num_questions=1))
    num_tokens = len(prompt.parts[0].token_ids)
    monkeypatch.setattr(engine, "max_len", num_tokens + 3)
    with pytest.raises(SampleError, match=f"maximum context length is {num_tokens + 3} tokens"):
        list(engine.answer([prompt], plan="none", max_new_tokens=4))
    sampling = Sampling(ignore_eos=True)
    (whole,) = engine.answer([prompt], plan="none", max_new_tokens=3, sampling=sampling)
    assert len(whole.token_ids[0]) == 3
    # Several questions: what there is room for.
    several = engine.prompt(conversation(3, num_questions=3))
    monkeypatch.setattr(engine, "max_len", sum(len(part.token_ids) for part in several.parts) + 8)
    (cut,) = engine.answer([several], plan="none", max_new_tokens=7, sampling=sampling)
    assert len(cut.token_ids[0]) == 7
    assert sum(map(len, cut.token_ids)) < 3 * 7
