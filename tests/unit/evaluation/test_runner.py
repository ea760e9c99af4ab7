"""Reading questions, scoring answers and the six rows, with an engine that plays back given
answers."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.evaluation.ablations import (
    ROWS,
    details,
    random_plans,
    run_ablations,
    table_rows,
)
from megatron_vico.evaluation.runner import (
    EvaluationSample,
    Question,
    read_evaluation_set,
    run_evaluation,
)
from megatron_vico.inference.engine import Answers
from megatron_vico.inference.plans import Routing
from megatron_vico.inference.pruning import Pruning

LINE = {
    "id": "a",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "4712"},
        {"from": "human", "value": "and?"},
        {"from": "gpt", "value": "cat"},
    ],
    "metrics": ["anls", "exact"],
    "kinds": ["dense", "photo"],
}


QUESTIONS = (
    Question(answers=("4712",), metric="anls", kind="dense"),
    Question(answers=("cat",), metric="exact", kind="photo"),
)


def write(tmp_path, *lines):
    (tmp_path / "a.png").write_bytes(b"png")
    if not (tmp_path / "pipe").exists():
        os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "set.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(texts))
    return path


def test_questions_are_read_with_their_scoring(tmp_path):
    other = {**LINE, "answers": [["1", "one"], "dog"], "kinds": None}
    samples = read_evaluation_set(write(tmp_path, LINE, "\n", other), image_root=tmp_path)
    assert [sample.conversation.images for sample in samples] == [(b"png",)] * 2
    assert samples[0].questions == QUESTIONS
    assert samples[1].questions[0] == Question(answers=("1", "one"), metric="anls", kind="anls")
    assert samples[1].questions[1].answers == ("dog",), "a text is one answer"
    assert len(read_evaluation_set(tmp_path / "set.jsonl", image_root=tmp_path, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"conversations": [', r"set.jsonl:2: .*broken JSON"),
        ({**LINE, "metrics": ["anls"]}, r"set.jsonl:2: 1 metrics for 2 questions"),
        ({**LINE, "metrics": ["anls", "exakt"]}, r"unknown metric 'exakt'; did you mean 'exact'"),
        ({**LINE, "image": "b.png"}, r"set.jsonl:2: .*b.png: No such file"),
        ({"conversations": LINE["conversations"]}, r"set.jsonl:2: None metrics for 2"),
        ({**LINE, "metrics": "exact"}, "'exact' metrics for 2 questions; give a list"),
        ({**LINE, "metrics": [["exact"], 1]}, r"unknown metric \['exact'\]"),
        ({**LINE, "answers": [["a"], [1]]}, r"accepted answers \[1\]; expected a text, or a list"),
        ({**LINE, "images": ["a.png"]}, r"set.jsonl:2: media under 'images'"),
        ({**LINE, "image": "../a.png"}, r"'../a.png' leads out of .*--allow-outside-root"),
        ({**LINE, "image": "pipe"}, "pipe: not a plain file"),
        ({"conversations": LINE["conversations"][1:2], "metrics": []}, "no question"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(SampleError, match=message):
        read_evaluation_set(write(tmp_path, LINE, line), image_root=tmp_path)
    with pytest.raises(SampleError, match="no conversation"):
        read_evaluation_set(write(tmp_path, "\n"), image_root=tmp_path)


@pytest.mark.parametrize("text", ["[]", '{\n "a": 1\n}'])
def test_one_document_is_no_jsonl(tmp_path, text):
    (tmp_path / "set.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="one JSON document over several lines, or a list"):
        read_evaluation_set(tmp_path / "set.jsonl", image_root=tmp_path)


class PlayedEngine:
    """Answers as told; keeps what it was asked. Each conversation has two tiles of four tokens, one
    if compressed."""

    def __init__(self, texts, router_plans):
        self.texts = texts
        self.router_plans = router_plans
        self.model = SimpleNamespace(
            visual_tokens_per_tile=4, language=SimpleNamespace(num_layers=3)
        )
        self.weights = ""
        self.asked = []
        self.limits = []

    def prompt(self, sample):
        self.limits.append((self.weights, sample.max_dynamic_patch))
        return sample.key

    def answer(self, prompts, *, plan, max_new_tokens):
        self.asked.append((self.weights, plan))
        for index, key in enumerate(prompts):
            kept = plan.mean_kept(8) if isinstance(plan, Pruning) else 8
            if isinstance(plan, Pruning):
                compressed = torch.zeros(2, dtype=torch.bool)
            elif isinstance(plan, str):
                compressed = torch.full((2,), plan == "all")
            elif isinstance(plan, Routing):
                compressed = self.router_plans[plan.granularity][index]
            else:
                compressed = plan[index]
            yield Answers(
                texts=self.texts[key],
                compressed_N=compressed,
                probability_N=None,
                num_visual_tokens=round(kept) - 3 * int(compressed.sum()),
            )


@pytest.fixture
def samples():
    def sample(key):
        turns = tuple(Turn("human", "what?") for _ in range(2))
        conversation = ConversationSample(key=key, turns=turns)
        return EvaluationSample(conversation=conversation, questions=QUESTIONS)

    return [sample(key) for key in "abcd"]


@pytest.fixture
def engine():
    texts = {"a": ("4712", "cat"), "b": ("4711", "dog"), "c": ("4799", "cat"), "d": ("", "cat")}
    plans = {
        "tile": ([False, True], [False, True], [True, True], [False, False]),
        "image": ([True, True], [False, False], [True, True], [False, False]),
    }
    router_plans = {name: [torch.tensor(plan) for plan in each] for name, each in plans.items()}
    return PlayedEngine(texts, router_plans)


def test_scores_and_counts(engine, samples):
    result = run_evaluation(engine, samples, row="vico", plan=Routing()).result
    scores = [(1 + 1) / 2, (0.75 + 0) / 2, (0.5 + 1) / 2, (0 + 1) / 2]
    means = torch.tensor(scores, dtype=torch.float64)
    assert result.score == pytest.approx(float(means.mean()))
    assert result.standard_error == pytest.approx(float(means.std() / 2))
    assert result.score_by_kind == {"dense": pytest.approx(2.25 / 4), "photo": pytest.approx(3 / 4)}
    assert result.num_questions_by_kind == {"dense": 4, "photo": 4}
    assert result.compressed_by_kind == {"dense": 1 / 4, "photo": 3 / 4}
    assert result.compressed_tiles == 4 / 8
    assert (result.num_visual_tokens, result.num_visual_tokens_uncompressed) == (32 - 12, 32)
    assert result.visual_token_reduction == pytest.approx(12 / 32)


def test_each_row_gets_its_weights_and_plan(engine, samples):
    def engine_with(weights):
        engine.weights = weights
        return engine

    evaluations = run_ablations(engine_with, samples, seed=3)
    assert tuple(each.result.row for each in evaluations) == ROWS
    image_level = ("image_level", Routing(granularity="image"))
    for asked in (("vico", Routing()), ("vico", "all"), image_level, ("vanilla", "none")):
        assert asked in engine.asked
    plans = {weights: plan for weights, plan in engine.asked if isinstance(plan, list)}
    assert sorted(plans) == ["vico", "warmed"]
    assert engine.limits == [("vico", None)] * 4 + [("vanilla", 1)] * 4
    # Vanilla + ViR replays ViCO's decisions; random has exactly as many, elsewhere.
    assert torch.equal(torch.cat(plans["warmed"]), torch.cat(engine.router_plans["tile"]))
    assert int(torch.cat(plans["vico"]).sum()) == int(torch.cat(engine.router_plans["tile"]).sum())
    figures = {each.result.row: each.result for each in evaluations}
    assert figures["random_compress"].compressed_tiles == figures["vico"].compressed_tiles
    assert figures["vanilla"].visual_token_reduction == 0
    assert figures["all_compress"].visual_token_reduction == 0.75
    pruned = [plan for weights, plan in engine.asked if isinstance(plan, Pruning)]
    assert [weights for weights, plan in engine.asked if plan in pruned] == ["vanilla"] * 4
    assert [(plan.rule, plan.saved) for plan in pruned] == [
        *(("fastv", None), ("fastv", 12 / 32), ("sparsevlm", None), ("sparsevlm", 12 / 32))
    ]
    assert figures["fastv_default"].visual_token_reduction == 3 / 8  # (8 + 4 + 4) / 3, rounded
    assert figures["fastv"].visual_token_reduction == 3 / 8
    rows = table_rows(evaluations)
    assert rows[0].retention == 1
    assert [row.row for row in rows] == list(ROWS)
    by_kind = json.loads(json.dumps(details(evaluations)))[-1]["compressed_by_kind"]
    assert by_kind == {"dense": 0.25, "photo": 0.75}


def test_random_plans_have_exactly_as_many_compressed_tiles():
    counts = [1 + index % 5 for index in range(50)]
    decisions = torch.rand(sum(counts), generator=torch.Generator().manual_seed(0)) < 0.6
    first, again, other = (random_plans(decisions.split(counts), seed=seed) for seed in (0, 0, 1))
    assert [len(plan) for plan in first] == counts
    assert int(torch.cat(first).sum()) == int(decisions.sum())
    assert not torch.equal(torch.cat(first), decisions)
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(other))
