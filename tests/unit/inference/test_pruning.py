"""FastV and SparseVLM equal their rules in plain loops over the whole matrix of attention."""

import math

import pytest
import torch

from megatron_vico.data.encode.expand import expand
from megatron_vico.errors import ConfigError
from megatron_vico.inference.plans import read_plan
from megatron_vico.inference.pruning import Pruning, merge
from megatron_vico.inference.sampling import Sampling
from megatron_vico.inference.scheduler import Request, Scheduler
from megatron_vico.models.attention import rotate
from megatron_vico.models.attention_layout import batch_layout
from tests.toy_models import make_engine
from tests.unit.inference.test_engine import conversation, features_of

MAX_NEW_TOKENS = 5
RULES = [
    Pruning(rule="fastv", num_layers=4),
    Pruning(rule="fastv", num_layers=4, saved=0.6),
    Pruning(rule="sparsevlm", num_layers=4),
    Pruning(rule="sparsevlm", num_layers=4, saved=0.3),
]


@pytest.fixture(scope="module")
def engine(single_process_groups, tmp_path_factory):
    """Four layers; two heads share a key."""
    engine = make_engine(tmp_path_factory.mktemp("tokenizer"), size="toy-6b", batch_size=3)
    with torch.no_grad():  # fresh attention is nearly even, and drops nothing that matters
        for layer in engine.language_model.gpt.decoder.layers:
            layer.self_attention.linear_qkv.weight.mul_(20)
    return engine


class Watched:
    """Whole matrices of attention, [A, S, S] a layer, of what the layers are given."""

    def __init__(self, language_model):
        self.matrices, self._hooks = {}, []
        for number, layer in enumerate(language_model.gpt.decoder.layers):
            core = layer.self_attention.core_attention

            def see(module, args, kwargs, number=number, core=core):
                layout = kwargs["packed_seq_params"]
                q, k = (rotate(x, layout.cos, layout.sin)[:, 0] for x in args[:2])
                share = q.size(1) // k.size(1)
                matrix = []
                for head in range(q.size(1)):
                    logits = q[:, head] @ k[:, head // share].T * core.scale
                    future = torch.ones_like(logits).triu(1).bool()
                    matrix.append(logits.masked_fill(future, -math.inf).softmax(-1))
                self.matrices[number] = torch.stack(matrix)

            self._hooks.append(core.register_forward_pre_hook(see, with_kwargs=True))

    def close(self):
        for hook in self._hooks:
            hook.remove()


def naive_merge(tokens, num):
    """Density-peak clusters, a pair of tokens at a time."""
    count, channels = tokens.shape
    distance = [[math.dist(a, b) / channels**0.5 for b in tokens.tolist()] for a in tokens.tolist()]
    noise = torch.rand(count, generator=torch.Generator().manual_seed(0)).tolist()
    density, peak = [], []
    for i in range(count):
        nearest = sorted(distance[i])[:num]
        density.append(math.exp(-sum(d * d for d in nearest) / num) + 1e-6 * noise[i])
    furthest = max(map(max, distance))
    for i in range(count):
        denser = [distance[i][j] for j in range(count) if density[j] > density[i]]
        peak.append(density[i] * min(denser, default=furthest))
    middles = sorted(range(count), key=lambda i: -peak[i])[:num]
    clusters = [[] for _ in middles]
    for i in range(count):
        own = middles.index(i) if i in middles else None
        nearest = min(range(num), key=lambda c: distance[i][middles[c]]) if own is None else own
        clusters[nearest].append(tokens[i])
    return middles, torch.stack([torch.stack(each).mean(0) for each in clusters])


def naive_hidden(engine, ids, positions, visual, visual_positions, prompt_len, pruning):
    """Hidden states behind the last layer, and the visual tokens that each layer had."""
    model = engine.language_model
    hidden = model.gpt.embedding(torch.tensor([ids]), None)
    hidden[visual_positions, 0] = visual
    where, asking = visual_positions.tolist(), prompt_len - 1
    raters = [asking]
    if pruning.rule == "sparsevlm" and where:
        text = list(range(where[-1] + 1, prompt_len))
        relevance = (hidden[where, 0] @ hidden[text, 0].T).softmax(-1).mean(0).tolist()
        mean = sum(relevance) / len(relevance)
        raters = [t for t, value in zip(text, relevance, strict=True) if value > mean]
    cuts, watched, seen = pruning.cuts(len(where)), Watched(model), []
    for number, layer in enumerate(model.gpt.decoder.layers):
        count = len(positions)
        layout = batch_layout(
            torch.tensor([positions]),
            cache=None,
            rows_B=torch.zeros(1),
            num_new_B=torch.tensor([count]),
            rotary=model.rotary,
            dtype=hidden.dtype,
        )
        seen.append(len(where))
        hidden, _ = layer(hidden_states=hidden, attention_mask=None, packed_seq_params=layout)
        if number not in cuts:
            continue
        matrix, cut = watched.matrices[number], cuts[number]
        score = {v: sum(float(matrix[:, r, v].mean()) for r in raters) / len(raters) for v in where}
        ranked = sorted(where, key=lambda v: -score[v])
        gone = set(ranked[cut.kept :])
        pool = ranked[cut.kept : cut.kept + cut.pool]
        rows, new_positions, moved = [], [], {}
        for t in range(count):
            if t not in gone:
                moved[t] = len(rows)
                rows.append(hidden[t])
                new_positions.append(positions[t])
            if t == where[-1] and cut.merged:
                first = len(rows)
                middles, merged = naive_merge(hidden[pool, 0], cut.merged)
                rows += [each[None] for each in merged]
                new_positions += [positions[pool[m]] for m in middles]
        where = [moved[v] for v in where if v in moved]
        where += list(range(first, first + cut.merged)) if cut.merged else []
        raters = [moved[r] for r in raters]
        hidden, positions = torch.stack(rows), new_positions
    watched.close()
    return model.gpt.decoder.final_layernorm(hidden), seen


@torch.no_grad()
def naive_answers(engine, prompt, pruning):
    """Every token of every answer from all that was read and said, ranked by its question."""
    tokenizer = engine.tokenizer
    ids, answers, visual, positions = [], [], [], []
    for part in prompt.parts:
        nothing = torch.zeros(part.num_tiles, dtype=torch.bool)
        stream = expand([part], plan=nothing, tokens_kept=4, tokens_compressed=1, image_token_id=5)
        ids += [tokenizer.eos_id] if ids else []
        positions.append(stream.visual_positions + len(ids))
        visual.append(engine.encoder.visual_tokens(features_of(engine, part), nothing))
        ids += stream.token_ids.tolist()
        prompt_len, answer = len(ids), []
        while len(answer) < MAX_NEW_TOKENS:
            hidden, seen = naive_hidden(
                engine,
                ids,
                list(range(len(ids))),
                torch.cat(visual),
                torch.cat(positions),
                prompt_len,
                pruning,
            )
            logits = engine.language_model.response_logits(hidden[-1:, 0])
            token = int(logits[:, : tokenizer.vocab_size].argmax())
            if token == tokenizer.eos_id:
                break
            answer.append(token)
            ids.append(token)
        answers.append(tuple(answer))
    return tuple(answers), seen


@pytest.mark.parametrize("pruning", RULES, ids=lambda each: f"{each.rule}={each.saved}")
def test_batched_answers_equal_naive_ones(engine, pruning):
    prompts = [engine.prompt(conversation(index)) for index in range(6)]
    answers = list(engine.answer(prompts, plan=pruning, max_new_tokens=MAX_NEW_TOKENS))
    for prompt, found in zip(prompts, answers, strict=True):
        expected, seen = naive_answers(engine, prompt, pruning)
        assert found.token_ids == expected
        assert not found.compressed_N.any()
        assert found.num_visual_tokens == round(sum(seen) / len(seen))
        assert seen[0] == 4 * prompt.num_tiles
        assert seen[-1] < seen[0] or not prompt.num_tiles
    plain = engine.answer(prompts, plan="none", max_new_tokens=MAX_NEW_TOKENS)
    differ = [a.token_ids != b.token_ids for a, b in zip(answers, plain, strict=True)]
    assert any(differ)  # what is dropped matters here


def test_nothing_saved_is_the_plain_engine(engine):
    prompts = [engine.prompt(conversation(index)) for index in range(6)]
    plain = list(engine.answer(prompts, plan="none", max_new_tokens=MAX_NEW_TOKENS))
    for rule in ("fastv", "sparsevlm"):
        nothing = Pruning(rule=rule, num_layers=4, saved=0.0)
        found = engine.answer(prompts, plan=nothing, max_new_tokens=MAX_NEW_TOKENS)
        assert [a.token_ids for a in found] == [a.token_ids for a in plain]


def test_answers_do_not_depend_on_what_else_is_in_the_batch(engine):
    """Requests of every rule and of none, joining at any step, say what they say alone."""
    plans = [*RULES, "none"]
    prompts = [engine.prompt(conversation(index)) for index in range(10)]

    def request(index):
        sampling = Sampling(max_new_tokens=7, ignore_eos=index % 2 == 0)
        return Request(prompt=prompts[index], plan=plans[index % 5], sampling=sampling)

    alone = [request(index) for index in range(10)]
    for one in alone:
        scheduler = Scheduler(engine)
        scheduler.add(one)
        while not scheduler.idle:
            scheduler.step()
    scheduler, together = Scheduler(engine), [request(index) for index in range(10)]
    for one in together:
        scheduler.add(one)
        scheduler.step()
    while not scheduler.idle:
        scheduler.step()
    for one, other in zip(alone, together, strict=True):
        assert [a.ids for a in one.answers] == [a.ids for a in other.answers]
    assert scheduler.cached_tokens == 0
    assert not scheduler._cache.dropped.any()


def test_clusters_equal_naive_ones():
    for seed in range(5):
        tokens = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
        middles, merged = merge(tokens, 5)
        expected_middles, expected = naive_merge(tokens, 5)
        assert middles.tolist() == expected_middles
        torch.testing.assert_close(merged, expected, atol=1e-6, rtol=0)  # measured 2.4e-7


def test_published_settings_and_matched_ones():
    """36 layers: K = 2 and R = 0.5; the R and the shares that save ViCO's 41.25 %."""
    fastv = Pruning(rule="fastv", num_layers=36)
    assert {layer: cut.kept for layer, cut in fastv.cuts(2560).items()} == {1: 1280}
    assert fastv.mean_kept(2560) == (2 * 2560 + 34 * 1280) / 36
    matched = Pruning(rule="fastv", num_layers=36, saved=0.4125)
    assert matched.cuts(10_000)[1].kept == 10_000 - 4368  # R = 0.437
    sparse = Pruning(rule="sparsevlm", num_layers=32)
    cuts = sparse.cuts(576)
    assert {layer: cut.kept for layer, cut in cuts.items()} == {2: 300, 6: 200, 15: 110}
    assert [cut.merged for cut in cuts.values()] == [9, 4, 3]
    for rule in ("fastv", "sparsevlm"):
        for num_visual in (256, 2560, 6144):
            kept = Pruning(rule=rule, num_layers=36, saved=0.4125).mean_kept(num_visual)
            assert abs(kept / num_visual - 0.5875) < 2e-3


@pytest.mark.parametrize(
    ("name", "num_layers", "message"),
    [
        ("fastv", 1, r"'fastv' needs 2 layers; the model has 1"),
        ("sparsevlm", 2, r"'sparsevlm' needs 3 layers; the model has 2"),
        ("fastv=0.7", 3, r"'fastv=0.7': expected .* in \[0, 0.66\] for 3 layers"),
        ("fastv=x", 3, r"share of visual tokens saved in \[0, 1\], as fastv=0.4"),
        ("sparsevlm=-1", 3, "share of visual tokens saved"),
    ],
)
def test_plans_that_a_model_cannot_follow(name, num_layers, message):
    with pytest.raises(ConfigError, match=message):
        read_plan(name, routing=None, num_layers=num_layers)
