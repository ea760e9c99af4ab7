"""What a run is: frozen, typed sections of options; the docstring under a field is its help text.

Options that Megatron has too keep Megatron's names. Those that this project reads itself, or sets a
default for, stand here; those that only megatron-core reads are in config/megatron_options.py.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vico.config.megatron_options import (
    DdpOptions,
    OptimizerStateOptions,
    TransformerOptions,
)
from megatron_vico.config.stages import STAGES, Module, Stage, StageSpec

WIDE_ROWS = 2048
"""Rows whose gradients a GPU multiplies at once. At 1,024 the traffic of the float32 weight
gradient takes an H100 longer than the product (`benchmarks/kl_floor.py`)."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and the few of its settings that are not fixed by its size."""

    model_size: str | None = None
    """A preset's name, such as internvl3_5-8b; the path of a config.json or of its folder; or
    `checkpoint`, the size of the one that is loaded. Unset, that too, or `toy` if none is."""

    drop_path_rate: float = 0.0
    """Stochastic depth of the vision tower's last layer, in [0, 1); it grows linearly from 0."""

    attention: Literal["auto", "sdpa"] = "auto"
    """Of the language model: TransformerEngine's where there is a GPU (auto), or torch's (sdpa)."""

    encoder_chunk_tiles: int = 16
    """Tiles that the vision tower works on, and recomputes in the backward pass, at once."""

    encoder_recompute: Literal["chunk", "layer"] = "layer"
    """Of a trained vision tower, whose activations a chunk's backward pass holds: those of all its
    layers (chunk), or of one, for one more pass over the tiles (layer)."""


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What is trained, against what, and ViCO's own settings."""

    stage: Stage = "consistency"
    """pretrain (cross-entropy), warmup (Eq. 1 for connector_16x), consistency (Eq. 1) or router
    (Eq. 2-4)."""

    train_modules: tuple[Module, ...] | None = None
    """Modules that get gradients; unset, the stage's own choice (config/stages.py)."""

    lr_mult: tuple[str, ...] = ()
    """Learning rates of modules as multiples of --lr: MODULE=FACTOR, such as connector_16x=3."""

    reference_load: str | None = None
    """Checkpoint of the frozen reference; unset, --pretrained-checkpoint. The router stage must
    name it: there the reference is the model from before consistency training."""

    reference_offload: Literal["none", "vit", "host"] = "none"
    """What of the frozen reference is kept in host memory while the policy runs: nothing, its
    vision tower, or that and its language model; what it shares with the policy stays."""

    fp8_max_reference_kl: float | None = None
    """With --fp8-format, most nats by which the reference's answers may differ from its own in
    bf16 (KL over the first step's packs), or the run stops; unset, a tenth of the policy's KL to it
    on the same packs."""

    freeze_moe_router: bool = False
    """Keep the expert router's weights while the rest of the language model is trained."""

    kl_chunk_rows: int = 512
    """Rows whose logits exist at once in a loss: fewer take less memory and more time. Gradients of
    2,048 rows are multiplied at once, whatever it is."""

    xi_sampler: Literal["stratified", "bernoulli", "exact-count"] = "stratified"
    """How an image's share xi ~ U[0, 1] of compressed tiles is drawn: one stratum of [0, 1) for
    each image of a pack, so that packs have policy streams of like length (stratified), or for each
    image alone, and then each tile with probability xi (bernoulli) or exactly round(xi * N) tiles
    (exact-count)."""

    router_granularity: Literal["tile", "image"] = "tile"
    """What ViR decides on: each tile (ViCO), or all of an image (image-level row of Table 3)."""

    router_window: int = 2048
    """How many past loss ratios r of Eq. 2 the threshold is taken from."""

    router_percentile: float = 60.0
    """Percentile of the window that is the threshold of Eq. 3, in [0, 100]."""

    router_eps: float = 1e-6
    """Added to both KL values of Eq. 2, in nats, so that equal models give a ratio near 1."""

    @property
    def spec(self) -> StageSpec:
        """The stage's row in the table of stages."""
        return STAGES[self.stage]

    @property
    def trained(self) -> tuple[Module, ...]:
        """The modules that get gradients in this run."""
        return self.spec.train_modules if self.train_modules is None else self.train_modules

    @property
    def lr_factors(self) -> dict[Module, float]:
        """--lr-mult as a table; `config/validate.py` has checked names and numbers."""
        pairs = (item.split("=", 1) for item in self.lr_mult)
        return {name: float(factor) for name, factor in pairs}  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class TilingOptions:
    """How images become tiles."""

    max_dynamic_patch: int = 12
    """Most tiles of one image, thumbnail not counted (the official name)."""

    use_thumbnail: bool = True
    """Append the whole image as one more tile when it was cut into several."""

    tile_tags: Literal["none", "numbered"] = "none"
    """Text before each tile: none (InternVL) or <tile_1>, ... (NVLM's, which small models need)."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(TilingOptions):
    """Shards, tokenizer, tiling and packing."""

    data_path: tuple[str, ...] = ()
    """Folders of WebDataset shards made by `vico shards make`, read as one data set; also any URL
    that fsspec opens, such as s3://bucket/shards (needs s3fs). A number before a folder says how
    often its samples come in an epoch (`0.5 /a 2 /b`; once if there is none); a mixture.json stands
    for its folders."""

    data_cache_dir: str | None = None
    """Local folder in which whole shards of a URL are kept; unset, each sample is one request."""

    data_cache_gb: float | None = None
    """Most gigabytes (1e9 bytes) of it; the shards used longest ago make room. With room for two
    blocks of --shuffle-shards shards, each shard is fetched about once an epoch."""

    data_timeout_s: float = 300.0
    """Seconds after which a run ends whose loader's workers give nothing; a read from a URL that
    takes a fifth of it is tried again."""

    data_retries: int = 5
    """How often a read from a URL is tried again, each time after twice the wait; 5: a minute."""

    valid_data_path: tuple[str, ...] = ()
    """Folders of shards, as --data-path, that the stage's loss is taken of without training on
    them; a number weighs a folder (0.1: a tenth of its samples, the same ones each time)."""

    tokenizer_model: str | None = None
    """A Hugging Face tokenizer folder, or a SentencePiece .model file."""

    seq_length: int = 32768
    """Most tokens in a pack, counted in the reference stream (every tile uncompressed)."""

    max_tiles_per_pack: int = 112
    """Most tiles in a pack; bounds the memory of visual tokens. Packs of --seq-length 32768 are
    full of tokens up to 82 % visual ones (benchmarks/packing.py)."""

    max_samples_per_pack: int | None = None
    """Most samples in a pack; unset, as many as fit."""

    packing_window: int = 512
    """Samples of the global order that are packed together (best-fit decreasing, carry-over)."""

    shuffle_shards: int = 64
    """Shards whose samples are shuffled together; about as many files are read at a time."""

    data_url_schemes: tuple[str, ...] = ()
    """Schemes of URLs that a mixture file may name besides those of common storage (s3, gs, https
    and others)."""

    override_data_state: bool = False
    """Resume though shards, repeats, seed or packing options changed; otherwise that is refused."""

    num_workers: int = 2
    """Processes that read, decode, tile and pack; 0 does it on the training thread."""

    prefetch_steps: int = 2
    """Steps that all workers of a data-parallel rank together prepare ahead (a pack each at least);
    a pack of 96 tiles of 448 px takes 58 MB. Without workers nothing is prepared ahead."""

    max_skipped_share: float = 0.001
    """Largest share of broken samples, in [0, 1], among those seen so far, or among 10,000 if there
    were fewer. A broken sample leaves its place in the pack empty; more of them end the run with a
    table of causes."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long, how much at once, and in which number format."""

    train_iters: int = 100
    """Optimizer steps of the stage."""

    global_batch_size: int = 256
    """Packs (not samples) in one optimizer step, over all data-parallel ranks."""

    seed: int = 1234
    """Seeds initialisation, data order, plans and dropout."""

    bf16: bool = False
    """Train in bfloat16 with fp32 master weights; otherwise fp32."""

    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    """What is done where a step's loss or gradient is no number or explodes, before it reaches the
    weights: end the run (stop); go on with the next batch (skip); or do so from the last checkpoint
    of --save (rollback). The keys of its samples are told."""

    bad_step_factor: float = 1000.0
    """A step is bad if its loss or gradient norm is more than so many times the median of the last
    100 good steps (once there are 20); 0: only if it is no finite number."""

    log_interval: int = 1
    """Steps between two log lines."""

    save_interval: int | None = None
    """Steps between two checkpoints; unset, only at the end; 0, none at all, as for a benchmark."""

    exit_interval: int | None = None
    """Stop, with a checkpoint, when the step count is a multiple of this."""

    eval_interval: int | None = None
    """Steps between two passes over --valid-data-path; unset, only at the end."""

    eval_iters: int | None = None
    """Global batches of one such pass, the same ones each time; unset, all of the data once."""

    profile: bool = False
    """Record some steps with torch.profiler to <save>/trace, in Chrome's trace format, a file a
    rank; `vico plot trace` draws the pipeline from them."""

    profile_step_start: int = 10
    """Steps done when --profile begins to record."""

    profile_step_end: int = 12
    """Steps done when --profile has recorded enough: 9 and 10 record the tenth step alone."""

    profile_ranks: tuple[int, ...] = ()
    """Ranks that --profile records; unset, all."""

    gpu_peak_tflops: float | None = None
    """Dense bf16 TFLOP/s of a GPU, for MFU; unset, known from its name. On a CPU there is none."""

    distributed_timeout_minutes: int = 30
    """Minutes a collective may wait before the run is ended; ranks wait in one while another writes
    a checkpoint to a slow disk."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Where the run comes from and where it goes."""

    save: str | None = None
    """Folder for checkpoints, metrics.jsonl, config.yaml, TensorBoard and wandb files."""

    load: str | None = None
    """Checkpoint folder to resume from, with all state; may be --save, and empty at first."""

    pretrained_checkpoint: str | None = None
    """Checkpoint folder whose weights alone the run starts from when there is nothing to resume."""

    ckpt_step: int | None = None
    """Which step of --load to take; unset, the one named by its `latest` pointer."""

    keep_last: int | None = None
    """Remove checkpoints but for so many of the newest, each time one has been saved; unset, none
    is removed, or all but one that --keep-every does not keep."""

    keep_every: int | None = None
    """Keep the checkpoints of all steps that this number divides, and --keep-last."""

    tensorboard_dir: str | None = None
    """Folder for TensorBoard files; unset, <save>/tensorboard."""

    wandb_project: str | None = None
    """Log to this project of wandb too, under the name of the --save folder; needs `pip install
    wandb`. WANDB_MODE=offline needs no account; wandb's other variables act as well."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW with a warm-up and a decay, under Megatron's names."""

    lr: float = 4e-6
    """Highest learning rate."""

    min_lr: float = 1e-7
    """Learning rate at the end of the decay."""

    lr_warmup_iters: int = 0
    """Steps of linear warm-up from 0."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay from --lr to --min-lr."""

    lr_decay_iters: int | None = None
    """Steps until --min-lr is reached; unset, --train-iters."""

    weight_decay: float = 0.05
    """AdamW's decoupled weight decay; never on biases and one-dimensional weights."""

    adam_beta1: float = 0.9
    """Decay of the gradient's running mean."""

    adam_beta2: float = 0.999
    """Decay of the squared gradient's running mean."""

    adam_eps: float = 1e-8
    """Added to the root of the squared gradient's mean."""

    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """The layout of one model replica over ranks, under Megatron's names."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer of the language model."""

    pipeline_model_parallel_size: int = 1
    """Stages the layers of the language model are cut into."""

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of a chunk of the interleaved schedule, in a middle stage; unset, no interleaving."""

    context_parallel_size: int = 1
    """Ranks that share each sequence."""

    expert_model_parallel_size: int = 1
    """Ranks the experts are spread over."""

    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert; unset, --tensor-model-parallel-size."""

    sequence_parallel: bool = False
    """Shard norms and dropouts over the tensor-parallel ranks along the sequence."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Which activations the policy recomputes in the backward pass; unset, none."""

    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: layers in uniform groups, or the first ones of each stage."""

    recompute_num_layers: int | None = None
    """With full recompute: layers of a group (uniform) or of each stage (block)."""

    recompute_modules: tuple[str, ...] = ()
    """With selective recompute: which parts, such as core_attn, moe, layernorm."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""

    overlap_param_gather: bool = False
    """Gather the distributed optimizer's parameters while the forward pass runs."""

    moe_token_dispatcher_type: Literal["alltoall"] = "alltoall"
    """How tokens reach their experts; unequal sequence lengths need all-to-all."""

    moe_aux_loss_coeff: float = 0.0
    """Weight of the load-balancing loss of the policy's expert router; 0 switches it off."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """FP8 format of TransformerEngine's linear layers; needs a Hopper GPU or newer."""

    fp8_recipe: Literal["tensorwise", "blockwise"] = "tensorwise"
    """How FP8 scales are found; delayed scaling is wrong with two models in one process."""


def flag_of(name: str) -> str:
    """An option as written on the command line."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One resolved run: default < recipe < command line."""

    model: ModelOptions = field(default_factory=ModelOptions)
    stage: StageOptions = field(default_factory=StageOptions)
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    transformer: TransformerOptions = field(default_factory=TransformerOptions)
    optimizer_state: OptimizerStateOptions = field(default_factory=OptimizerStateOptions)
    ddp: DdpOptions = field(default_factory=DdpOptions)
