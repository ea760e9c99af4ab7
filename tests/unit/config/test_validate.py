"""Each check of a run: what it lets through, what it stops, and that the message names a fix that
works."""

import re
from pathlib import Path

import pytest

from megatron_vico.config.flags import parse
from megatron_vico.config.layout import layers_of_a_stage
from megatron_vico.config.registry import MODELS, get_model_config
from megatron_vico.config.stages import STAGES
from megatron_vico.config.validate import remarks, validate
from megatron_vico.errors import ConfigError
from megatron_vico.training.preflight import check_environment, check_files

PP = "--pipeline-model-parallel-size"
VPP = "--num-layers-per-virtual-pipeline-stage"
TP = "--tensor-model-parallel-size"
EP = "--expert-model-parallel-size"
M8 = "--model-size internvl3_5-8b"
M30 = "--model-size internvl3_5-30b-a3b"
M241 = "--model-size internvl3_5-241b-a28b"
ACCOUNT = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"

GOOD = [
    ("", 1),
    ("", 256),
    ("--model-size internvl3_5-1b", 8),
    (f"{M8} {TP} 8 --sequence-parallel", 8),
    (f"{M8} {TP} 2 {PP} 4 {VPP} 3 --context-parallel-size 2", 64),
    (f"{M30} {EP} 8", 8),
    (f"{M30} {TP} 2 --sequence-parallel {EP} 8 --expert-tensor-parallel-size 1", 16),
    (
        (
            f"{M241} {TP} 2 {PP} 8 {VPP} 3 --sequence-parallel {EP} 8 --expert-tensor-parallel-size"
            f" 1 {ACCOUNT}"
        ),
        128,
    ),
    (
        (
            f"{M241} {PP} 4 --decoder-first-pipeline-num-layers 23"
            " --decoder-last-pipeline-num-layers 23"
        ),
        4,
    ),
    (f"{M241} {PP} 4 --pipeline-model-parallel-layout Et*23|t*24|t*24|t*23L", 4),
    ("--stage consistency --train-modules vit --drop-path-rate 0.1 --lr-mult vit=0.1", 1),
    ("--stage router --router-granularity image --router-percentile 50 --reference-load x", 1),
    ("--recompute-granularity selective --recompute-modules core_attn mlp", 1),
    (
        (
            f"{M30} --recompute-granularity selective --recompute-modules moe layernorm"
            " --moe-aux-loss-coeff 1e-3"
        ),
        1,
    ),
    (f"{FULL} 1", 1),
    ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 2),
    ("--overlap-grad-reduce", 2),
    ("--bf16 --fp8-format hybrid --fp8-param-gather", 1),
    ("--use-distributed-optimizer --use-precision-aware-optimizer --exp-avg-dtype bf16", 2),
    ("--optimizer-cpu-offload --optimizer-offload-fraction 1.0", 1),
    ("--fine-grained-activation-offloading --offload-modules core_attn", 1),
    ("--save x --save-interval 10", 1),
    ("--data-path /a s3://b/c --data-cache-dir x --data-cache-gb 0.5 --data-retries 0", 1),
    ("--save x --train-iters 3 --profile --profile-step-start 2 --profile-step-end 3", 1),
    ("--valid-data-path x y --eval-interval 5 --eval-iters 2", 1),
    ("--reference-offload host --kl-chunk-rows 1 --encoder-chunk-tiles 1", 1),
    (
        (
            "--stage warmup --reference-offload host --reference-load other"
            " --pretrained-checkpoint one"
        ),
        1,
    ),
    ("--stage router --reference-offload host", 1),
    (f"{M30} --freeze-moe-router", 1),
    (f"{M30} --recompute-granularity selective --recompute-modules moe_act --moe-grouped-gemm", 1),
    ("--stage router --use-distributed-optimizer", 2),
    ("--clip-grad 0 --weight-decay 0 --num-workers 0 --drop-path-rate 0", 1),
]

BAD = [
    ("--num-workers 0 --prefetch-steps 4", 1, "--prefetch-steps 4 has no effect without workers"),
    (
        "--data-cache-dir x",
        1,
        "--data-cache-dir x and --data-cache-gb None belong together; set both",
    ),
    (
        "--data-path a --data-cache-dir x --data-cache-gb 1",
        1,
        "--data-cache-dir x has no effect",
    ),
    ("--data-retries -1", 1, "--data-retries is -1, expected 0 or more"),
    # Layout against model.
    (
        "--model-size internvl3_5-9b",
        1,
        "unknown model size 'internvl3_5-9b'; did you mean 'internvl3_5-",
    ),
    (
        f"{M8} {TP} 3",
        3,
        f"{TP} 3 does not divide num_query_groups 8 of internvl3_5-8b; use 1, 2, 4 or 8.",
    ),
    (
        f"{M30} {TP} 8 --sequence-parallel",
        8,
        "does not divide num_query_groups 4 of internvl3_5-30b-a3b; use 2 or 4.",
    ),
    (f"{M30} {TP} 2", 2, "with the experts of internvl3_5-30b-a3b needs --sequence-parallel"),
    ("--sequence-parallel", 1, f"{TP} is 1; leave it out"),
    (f"{M8} {EP} 2", 2, f"{EP} 2 has no effect: internvl3_5-8b has no experts"),
    (f"{M8} --expert-tensor-parallel-size 1", 1, "--expert-tensor-parallel-size 1 has no effect"),
    (
        f"{M8} --moe-aux-loss-coeff 0.1",
        1,
        "--moe-aux-loss-coeff has no effect: internvl3_5-8b has no experts",
    ),
    (
        f"{M8} --moe-z-loss-coeff 0.1",
        1,
        "--moe-z-loss-coeff has no effect: internvl3_5-8b has no experts",
    ),
    (
        f"{M30} {EP} 3",
        3,
        "does not divide the 128 experts of internvl3_5-30b-a3b; use 1, 2, 4 or 8.",
    ),
    (f"{M30} --expert-tensor-parallel-size 5", 5, "does not divide moe_ffn_hidden_size 768"),
    (
        f"{M8} {PP} 5",
        5,
        (
            "the 36 layers of internvl3_5-8b cannot be shared equally by"
            " --pipeline-model-parallel-size 5"
        ),
    ),
    (
        f"{M241} {PP} 8",
        8,
        "or count embedding and loss as layers: --account-for-embedding-in-pipeline-split",
    ),
    (
        f"{M8} {PP} 4 {VPP} 2",
        4,
        f"{VPP} 2 does not divide the 9 layers of a pipeline stage; use 1 or 3.",
    ),
    (f"{M8} {VPP} 2", 1, f"{VPP} has no effect: {PP} is 1"),
    (f"{M8} {ACCOUNT}", 1, f"--account-for-embedding-in-pipeline-split has no effect: {PP} is 1"),
    (
        f"{M8} {PP} 4 {VPP} 3 --pipeline-model-parallel-layout t*36",
        4,
        "names the layers of every stage",
    ),
    (f"{TP} 0", 1, f"{TP} is 0, expected 1 or more"),
    # Layout against ranks and batch.
    (
        f"{M8} {TP} 4",
        6,
        (
            "world size 6 is not a multiple of tensor 4 x pipeline 1 x context 1 = 4 ranks; use 4"
            " or 8 ranks"
        ),
    ),
    (f"{M8} {PP} 4", 2, "use 4 ranks"),
    (f"{M30} {EP} 8", 4, f"world size 4 is not a multiple of {EP} 8"),
    (
        "--global-batch-size 250",
        16,
        "--global-batch-size 250 is not a multiple of the data-parallel size 16",
    ),
    ("--global-batch-size 250", 16, "use --global-batch-size 240 or 256, or 10 or 25 ranks."),
    (
        f"{M8} {PP} 4 {VPP} 3 --global-batch-size 6",
        4,
        "use --global-batch-size 4 or 8, or do without interleaving.",
    ),
    # Stage.
    (
        "--stage router --train-modules vit",
        1,
        "--train-modules vit: stage 'router' can train vir only",
    ),
    (
        "--stage warmup --train-modules connector_4x",
        1,
        "stage 'warmup' can train connector_16x only",
    ),
    (
        "--stage pretrain --train-modules vir",
        1,
        "stage 'pretrain' can train vit, connector_4x, language_model only",
    ),
    ("--train-modules vit vit", 1, "expected one or more modules, each once"),
    ("--stage router --xi-sampler exact-count", 1, "--xi-sampler has no effect in stage 'router'"),
    (
        "--router-window 7",
        1,
        "--router-window has no effect in stage 'consistency' (only in router)",
    ),
    ("--router-granularity image", 1, "--router-granularity has no effect"),
    (
        "--stage pretrain --reference-load x",
        1,
        "--reference-load has no effect in stage 'pretrain'",
    ),
    (
        "--drop-path-rate 0.1",
        1,
        "has no effect: the vision tower is frozen; leave it out, or train it",
    ),
    (
        f"--stage warmup {M30} --moe-aux-loss-coeff 0.1",
        1,
        "has no effect: the language model is frozen",
    ),
    (
        "--router-percentile 101 --stage router",
        1,
        "--router-percentile is 101.0, expected a number in [0, 100]",
    ),
    ("--router-eps -1 --stage router", 1, "--router-eps is -1.0"),
    ("--max-skipped-share 1.1", 1, "--max-skipped-share is 1.1, expected a number in [0, 1]"),
    ("--prefetch-steps 0", 1, "--prefetch-steps is 0, expected 1 or more"),
    ("--drop-path-rate 1", 1, "--drop-path-rate is 1.0, expected a number in [0, 1)"),
    (
        "--stage pretrain --reference-offload host",
        1,
        "--reference-offload has no effect in stage 'pretrain'",
    ),
    ("--stage warmup --reference-offload host", 1, "policy and reference share its weights"),
    ("--train-modules vit --reference-offload host", 1, "policy and reference share its weights"),
    ("--kl-chunk-rows 0", 1, "--kl-chunk-rows is 0, expected 1 or more"),
    ("--encoder-chunk-tiles 0", 1, "--encoder-chunk-tiles is 0, expected 1 or more"),
    ("--freeze-moe-router", 1, "--freeze-moe-router has no effect: toy has no experts"),
    (f"{M30} --stage router --freeze-moe-router", 1, "has no effect: the language model is frozen"),
    (
        "--stage warmup --overlap-grad-reduce",
        2,
        "--overlap-grad-reduce has no effect: the language model is frozen",
    ),
    (
        "--stage router --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        2,
        "has no effect: the language model is frozen",
    ),
    # --lr-mult.
    ("--lr-mult connector_16x", 1, "expected MODULE=FACTOR"),
    ("--lr-mult connector_8x=2", 1, "unknown module; did you mean 'connector_"),
    ("--lr-mult vit=2", 1, "has no effect: vit is frozen"),
    ("--lr-mult connector_16x=fast", 1, "the factor is 'fast', expected a number above 0"),
    ("--lr-mult connector_16x=0", 1, "expected a number above 0"),
    ("--lr-mult connector_16x=2 connector_16x=3", 1, "names connector_16x twice"),
    # Data.
    ("--max-tiles-per-pack 12", 1, "less than the 13 tiles of one large image"),
    (
        f"{M8} --seq-length 2048",
        1,
        "less than the 3328 visual tokens of one large image (13 tiles of 256)",
    ),
    ("--seq-length 0", 1, "--seq-length is 0, expected 1 or more"),
    ("--eval-interval 5", 1, "--eval-interval 5 has no effect without --valid-data-path"),
    ("--eval-iters 5", 1, "--eval-iters 5 has no effect without --valid-data-path"),
    ("--valid-data-path x --eval-interval 0", 1, "--eval-interval is 0, expected 1 or more"),
    ("--valid-data-path x --eval-iters -1", 1, "--eval-iters is -1, expected 1 or more"),
    # Recomputation.
    ("--recompute-method uniform", 1, "belong to --recompute-granularity full, found None"),
    ("--recompute-granularity full", 1, "add --recompute-method uniform --recompute-num-layers 1"),
    (f"{M8} {PP} 4 {FULL} 10", 4, "more than the 9 layers of a pipeline stage"),
    ("--recompute-modules mlp", 1, "belongs to --recompute-granularity selective, found None"),
    (
        "--recompute-granularity selective --recompute-modules core_atn",
        1,
        "did you mean 'core_attn'?",
    ),
    (
        f"{M8} --recompute-granularity selective --recompute-modules moe",
        1,
        "has no effect on internvl3_5-8b; use mlp",
    ),
    (f"{M30} --recompute-granularity selective --recompute-modules mlp", 1, "use moe"),
    (
        f"{M30} --recompute-granularity selective --recompute-modules moe_act",
        1,
        "needs --moe-grouped-gemm",
    ),
    (
        f"{M8} {PP} 4 {VPP} 3 {FULL} 4",
        4,
        "more than the 3 layers of a chunk of a pipeline stage (3 chunks a stage)",
    ),
    (f"--stage router {FULL} 1", 1, "--recompute-granularity has no effect in stage 'router'"),
    # Optimizer and number formats.
    ("--lr 0", 1, "--lr is 0.0, expected more than 0"),
    ("--lr nan", 1, "--lr is nan"),
    ("--min-lr 1", 1, "--min-lr 1.0 is more than --lr 4e-06"),
    ("--lr-warmup-iters 100", 1, "leaves nothing of the 100 steps of decay"),
    ("--overlap-param-gather", 2, "needs --use-distributed-optimizer and --overlap-grad-reduce"),
    (
        "--overlap-param-gather --use-distributed-optimizer",
        2,
        "needs --use-distributed-optimizer and --overlap-grad",
    ),
    ("--exp-avg-dtype bf16", 1, "--exp-avg-dtype bf16 needs --use-precision-aware-optimizer"),
    ("--use-precision-aware-optimizer", 1, "needs --use-distributed-optimizer"),
    ("--optimizer-cpu-offload", 1, "moves nothing without --optimizer-offload-fraction"),
    ("--fp8-format hybrid", 1, "--fp8-format hybrid needs --bf16"),
    ("--fp8-format hybrid --bf16 --attention sdpa", 1, "use --attention auto"),
    ("--fp8-param-gather", 1, "--fp8-param-gather has no effect without --fp8-format"),
    ("--offload-modules core_attn", 1, "belong together"),
    ("--adam-beta2 1", 1, "--adam-beta2 is 1.0, expected a number in [0, 1)"),
    # Checkpoints.
    ("--ckpt-step 3", 1, "chooses a step of --load"),
    ("--save-interval 3", 1, "--save-interval 3 needs --save"),
    ("--profile", 1, "--profile writes to <save>/trace, but --save is not set"),
    ("--profile-step-end 3", 1, "--profile-step-end has no effect without --profile"),
    ("--save x --profile --profile-step-start 12", 1, "expected more than --profile-step-start"),
    ("--save x --profile --profile-ranks 0 1", 1, "--profile-ranks 1: the run has ranks 0 to 0"),
    (
        "--save x --train-iters 3 --profile",
        1,
        "--profile-step-end 12 is never reached: --train-iters is 3",
    ),
]


@pytest.mark.parametrize(("words", "world_size"), GOOD)
def test_good_runs(words: str, world_size: int) -> None:
    validate(parse(words.split()), world_size)


@pytest.mark.parametrize(("words", "world_size", "message"), BAD)
def test_bad_runs(words: str, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(parse(words.split()), world_size)
    assert message in str(error.value)


@pytest.mark.parametrize("size", [name for name in MODELS if name.startswith("internvl")])
def test_tensor_and_pipeline_sizes_that_are_offered_do_work(size: str) -> None:
    for flag, wanted, extra in ((TP, 3, ["--sequence-parallel"]), (PP, 11, [])):
        words = ["--model-size", size, *extra, flag]
        with pytest.raises(ConfigError) as error:
            validate(parse([*words, str(wanted)]), wanted)
        offered = re.search(r"use ([\d, or]+)[.,]", str(error.value))
        assert offered is not None
        for number in re.findall(r"\d+", offered[1]):
            validate(parse([*words, number, "--global-batch-size", number]), int(number))


def test_uneven_pipeline_stages() -> None:
    language = get_model_config("internvl3_5-241b-a28b").language

    def layers(words: str) -> int:
        return layers_of_a_stage(parse(words.split()), language)

    assert layers(f"{PP} 8 {ACCOUNT}") == 12
    assert layers(f"{PP} 8") == 0
    assert layers(f"{PP} 8 --decoder-last-pipeline-num-layers 10") == 12
    assert (
        layers(
            f"{PP} 4 --decoder-first-pipeline-num-layers 23 --decoder-last-pipeline-num-layers 23"
        )
        == 24
    )


def test_each_stage_trains_by_default_what_it_may_train() -> None:
    for spec in STAGES.values():
        assert set(spec.train_modules) <= set(spec.trainable)


def test_the_trainer_takes_every_layout_and_no_fp8_yet() -> None:
    for words in (
        f"{M8} {TP} 2 --sequence-parallel {PP} 2 {VPP} 3 --context-parallel-size 2",
        f"{M30} {EP} 2 --freeze-moe-router",
        f"--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather {FULL} 1",
    ):
        check_environment(parse(words.split()))
    with pytest.raises(
        ConfigError, match="not trained with until the KL between an FP8 and a bf16 reference"
    ):
        check_environment(parse("--bf16 --fp8-format e4m3".split()))


def test_what_megatron_core_would_refuse_is_refused_before_it_runs() -> None:
    cfg = parse(f"{M8} {TP} 2 --sequence-parallel {FULL} 1 --distribute-saved-activations".split())
    validate(cfg, 2)
    with pytest.raises(
        ConfigError, match="megatron-core refuses these flags: distribute_saved_activations"
    ):
        check_environment(cfg)


def test_remarks() -> None:
    def found(words: str, world_size: int) -> str:
        return " ".join(remarks(parse(["--save", "x", *words.split()]), world_size))

    assert found("--use-distributed-optimizer", 2) == ""
    assert "no effect with one data-parallel rank" in found("--use-distributed-optimizer", 1)
    # The encoder is data-parallel over tensor-parallel ranks too.
    assert found(f"{M8} {TP} 2 --use-distributed-optimizer", 2) == ""
    assert "--overlap-grad-reduce: no effect" in found(f"{M8} {TP} 2 --overlap-grad-reduce", 2)
    assert "no effect" in found(
        f"{M8} {TP} 2 --use-distributed-optimizer --train-modules language_model", 2
    )
    assert "padded to a multiple of 8 tokens" in found(f"{M8} --context-parallel-size 4", 4)
    assert "each router" in found(f"{M30} --freeze-moe-router --moe-aux-loss-coeff 0.1", 2)
    assert "8 microbatches on 8 pipeline stages" in found(f"{PP} 8 --global-batch-size 8", 8)
    assert "no checkpoint" in " ".join(remarks(parse([]), 1))


def test_files_are_asked_for_when_a_run_starts(tmp_path: Path) -> None:
    def check(*words: str) -> None:
        cfg = parse(list(words))
        validate(cfg, 1)
        check_files(cfg)

    def problem(*words: str) -> str:
        with pytest.raises(ConfigError) as error:
            check(*words)
        return str(error.value)

    here = str(tmp_path)
    data = ["--data-path", here, "--tokenizer-model", here]
    assert "--data-path is not set" in problem()
    assert "--tokenizer-model is not set" in problem("--data-path", here)
    assert "--data-path gone: no such file" in problem(
        "--data-path", "2", "gone", *data[2:], "--load", here
    )
    assert "--data-path: no folder after 2" in problem(
        "--data-path", "0.5", here, "2", *data[2:], "--load", here
    )
    assert "--override-data-state is about a run that goes on" in problem(
        *data, "--override-data-state"
    )
    assert "stage 'consistency' has nothing to start from" in problem(*data)
    assert "stage 'router' needs --reference-load" in problem(
        *data, "--stage", "router", "--load", here
    )
    assert "gone: no such file or folder" in problem(*data, "--pretrained-checkpoint", "gone")
    assert "qq://a: fsspec cannot open it" in problem(
        *data[2:], "--data-path", "qq://a", "--load", here
    )
    check_files(parse([*data[2:], "--data-path", "memory://a", "--stage", "pretrain"]))
    assert "--valid-data-path gone: no such" in problem(
        *data, "--stage", "pretrain", "--valid-data-path", here, "gone"
    )
    assert "--valid-data-path: no folder after 2" in problem(
        *data, "--load", here, "--valid-data-path", here, "2"
    )
    check_files(parse([*data, "--pretrained-checkpoint", here]))
    check_files(parse([*data, "--stage", "pretrain"]))
    mixture = [
        "--data-path",
        "0.5",
        here,
        "memory://bucket/folder",
    ]  # reading says whether a URL is there
    check_files(parse([*mixture, *data[2:], "--stage", "pretrain"]))
