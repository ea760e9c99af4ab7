"""Memory and time of a layout by formula, in microseconds where a dry run takes a minute.

State is exact; what a step adds is a model, with the largest difference from dry runs in
tests/unit/planning/test_closed_forms.py. Packs are full, three quarters visual tokens, half of the
tiles compressed, samples a quarter of a pack.
"""

from dataclasses import dataclass

from megatron_vico.config.layout import num_microbatches, replica_size
from megatron_vico.config.pipeline_split import fixed_stages, layers_of_a_stage, virtual_stages
from megatron_vico.config.registry import LanguageConfig, ModelConfig
from megatron_vico.config.schema import WIDE_ROWS, RunConfig
from megatron_vico.config.stages import MODULES
from megatron_vico.planning.simulate import Pipeline, StageTimes, step_seconds
from megatron_vico.training.flops import (
    attention_flops_per_token_squared,
    language_flops_per_token,
    pack_cost,
    vit_flops_per_tile,
)

VISUAL, SAMPLES, ANSWERED = 0.75, 4, 0.125
"""Of a pack: share of visual tokens, samples, share of tokens that are trained on."""

LIVE = 1.75
"""Bytes of the layer in work over what its forward pass keeps: gradients come to it."""

LOGITS = 10
"""Bytes for each logit of a chunk: two fp32 models and the work on them."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of a GPU and its links, and the share of them that is expected."""

    flops_per_s: float = 989e12
    """bf16, datasheet of H100 and H200."""

    efficiency: float
    """Of `flops_per_s`, while a stage computes: published MFU is 0.40 to 0.45 for dense models and
    0.25 to 0.34 with experts."""

    node_bytes_per_s: float = 450e9
    """NVLink, one direction."""

    net_bytes_per_s: float = 50e9
    """One 400 Gbit/s adapter a GPU."""

    ranks_per_node: int = 8

    def link(self, ranks: int) -> float:
        """Bytes a second between neighbouring ranks that span so many."""
        return self.node_bytes_per_s if ranks <= self.ranks_per_node else self.net_bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A layout's memory and time."""

    memory: dict[str, float]
    """Bytes by part of the fullest stage."""

    stage: int
    """That stage."""

    floor_s: float
    """The step with every FLOP at the card's full rate and nothing else."""

    bubble: float
    """Time of the passes beyond that of the busiest stage at work, over the latter."""

    expected_s: float


def stage_layers(cfg: RunConfig, language: LanguageConfig) -> list[int]:
    """Layers of each pipeline stage, a layout string left out of account."""
    stages = cfg.parallel.pipeline_model_parallel_size
    if stages == 1:
        return [language.num_layers]
    fixed, options = fixed_stages(cfg.transformer), cfg.transformer
    layers = [layers_of_a_stage(cfg, language)] * stages
    layers[0] = fixed.get("decoder_first_pipeline_num_layers", layers[0])
    layers[-1] = fixed.get("decoder_last_pipeline_num_layers", layers[-1])
    layers[0] -= bool(options.account_for_embedding_in_pipeline_split)
    layers[-1] -= bool(options.account_for_loss_in_pipeline_split)
    return layers


def static_bytes(
    cfg: RunConfig, model: ModelConfig, *, world_size: int, stage: int
) -> dict[str, float]:
    """Bytes that a rank of a stage holds between two steps, by part."""
    parallel, language = cfg.parallel, model.language
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    width = parallel.expert_tensor_parallel_size or tensor
    h, head = language.hidden_size, language.head_dim
    layers = stage_layers(cfg, language)[stage]
    split = h * head * (2 * language.num_heads + 2 * language.num_query_groups)
    whole, experts = 2 * head + 2 * h, 0.0
    if language.num_experts is None:
        split += 3 * h * language.ffn_hidden_size
    else:
        whole += h * language.num_experts
        of_all = language.num_experts * 3 * h * (language.moe_ffn_hidden_size or 0)
        experts = layers * of_all / (parallel.expert_model_parallel_size * width)
    ends = (stage == 0) + (stage == stages - 1)
    matrices = layers * split / tensor + experts
    dense = layers * (split / tensor + whole) + ends * language.vocab_size * h / tensor
    dense += h if stage == stages - 1 else 0

    trained, counts = cfg.stage.trained, model.parameter_counts()
    encoder: dict[str, int] = {
        name: getattr(counts, name)
        for name in MODULES
        if name not in (*cfg.stage.spec.unused, "language_model")
    }
    moving = sum(size for name, size in encoder.items() if name in trained)
    size = 2 if cfg.training.bf16 else 4
    masters = 12 if cfg.training.bf16 else 8
    trains_language = "language_model" in trained
    # Copies of the matrices, as they are and transposed; otherwise they are all there is.
    fp8 = parallel.fp8_format is not None and not cfg.transformer.fp8_param_gather
    sharded = cfg.optimizer.use_distributed_optimizer
    dense_ranks = world_size // (tensor * stages) if sharded else 1
    expert_ranks = (
        world_size // (stages * parallel.expert_model_parallel_size * width) if sharded else 1
    )
    found = {
        "policy": size * (dense + experts) + 2 * matrices * fp8,
        "gradients": 4 * (trains_language * (dense + experts) + moving),
        "optimizer": masters
        * (
            trains_language * (dense / dense_ranks + experts / expert_ranks)
            + moving / (world_size if sharded else 1)
        ),
        "encoder": size * sum(encoder.values()),
    }
    if cfg.stage.spec.needs_reference:
        # What is frozen is shared, but with the router's reference, which is another model.
        another = cfg.stage.spec.reference == "named"
        kept = {"none": ("vit", "language_model"), "vit": ("language_model",), "host": ("vit",)}[
            cfg.stage.reference_offload
        ]
        held = {name for name in ("vit", "connector_4x") if another or name in trained}
        held -= {"vit"} - set(kept)
        own = dense + experts if another or trains_language else 0
        own *= "language_model" in kept
        found["reference"] = size * (own + sum(encoder[name] for name in held))
    return found


def step_bytes(
    cfg: RunConfig, model: ModelConfig, *, world_size: int, stage: int
) -> dict[str, float]:
    """Bytes that a step adds at its highest, by part: in a pass, or at the reference's tiles."""
    parallel, language = cfg.parallel, model.language
    stages, packs = parallel.pipeline_model_parallel_size, num_microbatches(cfg, world_size)
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    size, h, vision = (2 if cfg.training.bf16 else 4), language.hidden_size, model.vision
    tiles, compared = _tiles(cfg, model), cfg.stage.spec.needs_reference
    whole, short = float(cfg.data.seq_length), _policy_tokens(cfg, model)
    split = context * (tensor if parallel.sequence_parallel else 1)

    def in_work(tokens: float, per_token: float) -> float:
        """Of a layer that works on a pack."""
        return size * tokens / context / tensor * per_token

    def visual(text_and_tokens: float) -> float:
        """Visual tokens of all packs of one plan that a rank embeds; most on the first of them."""
        of_pack = text_and_tokens - (1 - VISUAL) * cfg.data.seq_length / min(split, 3)
        fullest = min(text_and_tokens, of_pack) / split
        return packs * fullest * h * size if stage == 0 else 0.0

    encoder = dict[str, float]()
    if "vit" not in cfg.stage.trained:
        features = tiles * vision.num_patches * vision.hidden_size * size
        encoder["encoder activations"] = packs * features / (stages * tensor * context)
    last = stage == stages - 1
    rows = last * packs * ANSWERED * cfg.data.seq_length / context * h * size
    forward_only = {"head": rows, "activations": in_work(whole, _passing_per_token(language))}
    if cfg.stage.spec.plans == "one_tile":  # all tokens are there from the start
        return encoder | forward_only | {"visual tokens": visual(whole) + 2 * visual(short)}
    under_way = _under_way(cfg, model, packs=packs, stage=stage)
    recomputed = parallel.recompute_granularity == "full"
    held = under_way * (
        size * short / split * h if recomputed else in_work(short, _kept_per_token(cfg, language))
    )
    live = in_work(short, _live_per_token(cfg, language))
    if not recomputed:
        live -= in_work(short, _kept_per_token(cfg, language, mlp=True))  # is held
    policy = encoder | {"visual tokens": visual(short), "head": rows}
    passes = [policy | {"activations": held + live}]
    if last:
        logits = LOGITS * cfg.stage.kl_chunk_rows + size * WIDE_ROWS  # and their gradient
        head = rows + logits * language.vocab_size / tensor
        passes.append(policy | {"head": head, "activations": held})
    if compared:
        passes.append(encoder | forward_only | {"visual tokens": visual(whole) + visual(short)})
    if compared and cfg.stage.reference_offload == "vit":
        passes.append(
            {
                "visual tokens": visual(whole),
                "encoder activations": size * model.parameter_counts().vit,
            }
        )
    return max(passes, key=lambda parts: sum(parts.values()))


def _under_way(cfg: RunConfig, model: ModelConfig, *, packs: int, stage: int) -> float:
    """Layers times packs whose activations a stage keeps for their backward pass."""
    stages, chunks = (
        cfg.parallel.pipeline_model_parallel_size,
        virtual_stages(cfg, model.language) or 1,
    )
    under_way = min(packs, stages - stage)
    if chunks > 1:
        under_way = min(packs * chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)
    return under_way * stage_layers(cfg, model.language)[stage] / chunks


def _kept_per_token(cfg: RunConfig, language: LanguageConfig, *, mlp: bool | None = None) -> float:
    """Numbers that a layer's forward pass keeps of a token where not all of it is recomputed.

    Of its MLP, by what is recomputed, unless `mlp` says so.
    """
    queries, keys = (
        count * language.head_dim for count in (language.num_heads, language.num_query_groups)
    )
    if mlp is None:
        mlp = "mlp" not in cfg.parallel.recompute_modules
    trained, (width, copies) = "language_model" in cfg.stage.trained, _mlp_per_token(language)
    # Queries and keys before and after their norm and rotation, values, what attention gives.
    kept = 2 * language.hidden_size + 4 * queries + 4 * keys + 2 * width * mlp
    # Weights want their inputs for their gradients; what is recomputed, its own.
    inputs = trained * (language.hidden_size + width * mlp)
    return kept + inputs + language.hidden_size * (trained * copies if mlp else 1)


def _live_per_token(cfg: RunConfig, language: LanguageConfig) -> float:
    """Numbers that a layer holds of a token at most in its backward pass."""
    if language.num_experts is None:
        return LIVE * _kept_per_token(cfg, language, mlp=True)
    heads = language.num_heads + language.num_query_groups
    copies = 2 + language.moe_top_k
    return (
        _passing_per_token(language) + 4 * heads * language.head_dim + copies * language.hidden_size
    )


def _passing_per_token(language: LanguageConfig) -> float:
    """Numbers that a layer holds of a token at most in a pass that keeps nothing."""
    width, copies = _mlp_per_token(language)
    if language.num_experts is None:
        return 5 * language.hidden_size + 4 * width
    # Tokens of experts in their order, sent, in the experts' order, and what they become.
    return (4 + 4 * copies) * language.hidden_size + 3 * width


def _mlp_per_token(language: LanguageConfig) -> tuple[int, int]:
    """Channels between the matrices of an MLP, and inputs of MLPs: of all experts of a token."""
    if language.num_experts is None:
        return language.ffn_hidden_size, 1
    assert language.moe_ffn_hidden_size is not None
    return language.moe_top_k * language.moe_ffn_hidden_size, language.moe_top_k


def _tiles(cfg: RunConfig, model: ModelConfig) -> int:
    return round(VISUAL * cfg.data.seq_length / model.visual_tokens_per_tile)


def _policy_tokens(cfg: RunConfig, model: ModelConfig) -> float:
    saved = (model.visual_tokens_per_tile - model.compressed_tokens_per_tile) / 2
    plans = cfg.stage.spec.plans
    return cfg.data.seq_length - (saved * _tiles(cfg, model) if plans == "xi" else 0)


def estimate(cfg: RunConfig, model: ModelConfig, *, world_size: int, machine: Machine) -> Estimate:
    """Memory and time of a step; the layout must be one that `config/layout.py` accepts."""
    stages = cfg.parallel.pipeline_model_parallel_size
    memories = [
        static_bytes(cfg, model, world_size=world_size, stage=stage)
        | step_bytes(cfg, model, world_size=world_size, stage=stage)
        for stage in range(stages)
    ]
    fullest = max(range(stages), key=lambda stage: sum(memories[stage].values()))
    packs = num_microbatches(cfg, world_size)
    tokens = cfg.data.seq_length / SAMPLES
    tiles = _tiles(cfg, model)
    of_pack = SAMPLES * pack_cost(model, cfg.stage).flops(round(tokens), tiles=tiles // SAMPLES)
    rows = ANSWERED * cfg.data.seq_length
    # Logits of both models, gradients of hidden states and weight.
    head = 4 * 2 * rows * model.language.hidden_size * model.language.vocab_size
    replica = replica_size(cfg.parallel)
    total = packs * (of_pack + head) / replica
    times = _stage_times(cfg, model, machine=machine)
    hop = _policy_tokens(cfg, model) * model.language.hidden_size * 2 / machine.net_bytes_per_s
    pipeline = Pipeline(
        packs=packs,
        chunks=virtual_stages(cfg, model.language) or 1,
        hop_s=hop / cfg.parallel.tensor_model_parallel_size / cfg.parallel.context_parallel_size,
    )
    passes = step_seconds(times, pipeline)
    busiest = packs * max(each.reference + each.forward + each.backward for each in times)
    encode = packs * tiles * pack_cost(model, cfg.stage).per_tile / replica
    if "vit" in cfg.stage.trained:
        encode += packs * tiles * vit_flops_per_tile(model.vision) / replica  # computed again
    memory = memories[fullest]
    reduced = memory["gradients"] * 1.5 / machine.net_bytes_per_s  # and weights are gathered
    return Estimate(
        memory=memory,
        stage=fullest,
        floor_s=total / machine.flops_per_s,
        bubble=passes / busiest - 1,
        expected_s=passes + encode / (machine.flops_per_s * machine.efficiency) + reduced,
    )


def _stage_times(cfg: RunConfig, model: ModelConfig, *, machine: Machine) -> list[StageTimes]:
    """Of each stage, seconds for a pack: arithmetic, and what is sent between its ranks."""
    language, parallel = model.language, cfg.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    cost = pack_cost(model, cfg.stage)
    rate = machine.flops_per_s * machine.efficiency * tensor * context

    def forward(tokens: float, layers: int) -> float:
        flops = language_flops_per_token(language) * tokens
        flops += attention_flops_per_token_squared(language) * tokens * tokens / SAMPLES
        share = layers / language.num_layers
        return share * flops / rate + layers * _sent(cfg, model, tokens, machine)

    whole, short = float(cfg.data.seq_length), _policy_tokens(cfg, model)
    rows = ANSWERED * cfg.data.seq_length
    head = 2 * rows * language.hidden_size * language.vocab_size / rate
    again = 1 if parallel.recompute_granularity == "full" else 0
    backward = max(cost.compressed_passes, cost.full_passes) - 1 + again
    layers = stage_layers(cfg, language)
    times = []
    for stage, count in enumerate(layers):
        is_last = stage == len(layers) - 1
        needs_reference = cfg.stage.spec.needs_reference
        times.append(
            StageTimes(
                reference=forward(whole, count) if needs_reference else 0.0,
                forward=forward(short, count) + is_last * head * (1 + needs_reference),
                backward=backward * forward(short, count) + is_last * 2 * head,
            )
        )
    return times


def _sent(cfg: RunConfig, model: ModelConfig, tokens: float, machine: Machine) -> float:
    """Seconds that a layer's forward pass sends: sequence shards, tokens to experts and back."""
    parallel, language = cfg.parallel, model.language
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    hidden = tokens / context * language.hidden_size * 2
    seconds = 4 * hidden * (tensor - 1) / tensor / machine.link(tensor)
    if language.num_experts is not None:
        experts = parallel.expert_model_parallel_size
        away = hidden / tensor * language.moe_top_k * (experts - 1) / experts
        seconds += 2 * away / machine.link(experts)
    return seconds
