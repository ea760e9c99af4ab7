"""Each check of a run: what it lets through, what it stops, and that the message names the fix."""

import re
from pathlib import Path

import pytest
from megatron.core import optimizer as megatron_optimizer

from megatron_vico.config.registry import MODELS
from megatron_vico.config.stages import STAGES
from megatron_vico.config.validate import remarks, validate
from megatron_vico.errors import ConfigError
from megatron_vico.training.preflight import check_environment, check_files
from tests.unit.config.run_words import long, run

# Short words as in run_words.py; @8: on 8 ranks, one if there is no such word.
GOOD = """
@1
@256
--model-size internvl3_5-1b @8
8b TP=8 SP @8
8b TP=2 PP=4 VPP=3 CP=2 @64
30b EP=8 @8
30b TP=2 SP EP=8 ETP=1 @16
241b TP=2 PP=8 VPP=3 SP EP=8 ETP=1 EMBEDDING LOSS @128
241b PP=4 FIRST=23 LAST=23 @4
241b PP=4 LAYOUT=Et*23|t*24|t*24|t*23L @4
--train-modules vit --drop-path-rate 0.1 --lr-mult vit=0.1
--stage router --router-granularity image --router-percentile 50 --reference-load x
SELECTIVE core_attn mlp
30b SELECTIVE moe layernorm --moe-aux-loss-coeff 1e-3
30b SELECTIVE moe_act --moe-grouped-gemm
FULL=1
--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather @2
--overlap-grad-reduce @2
--bf16 --fp8-format hybrid --fp8-param-gather --use-distributed-optimizer
--bf16 --fp8-format e4m3 --fp8-recipe blockwise --fp8-max-reference-kl 1e-4
--use-distributed-optimizer --use-precision-aware-optimizer --exp-avg-dtype bf16 @2
--optimizer-cpu-offload --optimizer-offload-fraction 1.0
--fine-grained-activation-offloading --offload-modules core_attn
--save x --save-interval 10
--data-path /a s3://b/c --data-cache-dir x --data-cache-gb 0.5 --data-retries 0
--save x --train-iters 3 --profile --profile-step-start 2 --profile-step-end 3
--valid-data-path x y --eval-interval 5 --eval-iters 2
--reference-offload host --kl-chunk-rows 1 --encoder-chunk-tiles 1
--stage warmup --reference-offload host --reference-load other --pretrained-checkpoint one
--stage router --reference-offload host
--stage router --reference-offload vit
--train-modules vit --reference-offload vit --encoder-recompute chunk --drop-path-rate 0.1
--stage router --use-distributed-optimizer @2
30b --freeze-moe-router
--clip-grad 0 --weight-decay 0 --num-workers 0 --drop-path-rate 0
"""

BAD = """
TP=0 => TP is 0, expected 1 or more.
8b PP=0 @4 => PP is 0, expected 1 or more.
8b PP=4 FIRST=0 @4 => FIRST is 0, expected 1 or more.
--seq-length 0 => --seq-length is 0, expected 1 or more.
--kl-chunk-rows 0 => --kl-chunk-rows is 0, expected 1 or more.
--encoder-chunk-tiles 0 => --encoder-chunk-tiles is 0, expected 1 or more.
--prefetch-steps 0 => --prefetch-steps is 0, expected 1 or more.
--valid-data-path x --eval-interval 0 => --eval-interval is 0, expected 1 or more.
--valid-data-path x --eval-iters -1 => --eval-iters is -1, expected 1 or more.
--data-retries -1 => --data-retries is -1, expected 0 or more.
--router-eps -1 --stage router => --router-eps is -1.0, expected 0 or more.
--lr 0 => --lr is 0.0, expected more than 0.
--lr nan => --lr is nan, expected more than 0.
--lr inf => --lr is inf, expected more than 0.
--adam-beta2 1 => --adam-beta2 is 1.0, expected a number in [0, 1).
--drop-path-rate 1 => --drop-path-rate is 1.0, expected a number in [0, 1).
--max-skipped-share 1.1 => --max-skipped-share is 1.1, expected a number in [0, 1].
--router-percentile 101 => --router-percentile is 101.0, expected a number in [0, 100].
--model-size internvl3_5-9b => unknown model size 'internvl3_5-9b'; did you mean 'internvl3_5-

--stage router --train-modules vit => --train-modules vit: stage 'router' can train vir only
--stage warmup --train-modules connector_4x => stage 'warmup' can train connector_16x only
--stage pretrain --train-modules vir => can train vit, connector_4x, language_model only
--train-modules vit vit => expected one or more modules, each once
--stage router --xi-sampler exact-count => --xi-sampler has no effect in stage 'router'
--router-window 7 => --router-window has no effect in stage 'consistency' (only in router)
--router-granularity image => --router-granularity has no effect
--stage pretrain --reference-load x => --reference-load has no effect in stage 'pretrain'
--stage pretrain --reference-offload host => has no effect in stage 'pretrain' (only in warmup,
--stage router FULL=1 => --recompute-granularity has no effect in stage 'router'
--drop-path-rate 0.1 => no effect: the vision tower is frozen; leave it out, or train it: --train
--stage warmup --drop-path-rate 0.1 => is frozen; leave it out, or use another stage.
30b --stage warmup --moe-aux-loss-coeff 0.1 => has no effect: the language model is frozen
30b --stage warmup --moe-z-loss-coeff 0.1 => has no effect: the language model is frozen
--stage warmup --hidden-dropout 0.1 => has no effect: the language model is frozen
--stage warmup --attention-dropout 0.1 => has no effect: the language model is frozen
30b --stage router --freeze-moe-router => has no effect: the language model is frozen
--stage warmup --overlap-grad-reduce @2 => --overlap-grad-reduce has no effect: the language model
--stage router --overlap-param-gather @2 => has no effect: the language model is frozen
--freeze-moe-router => --freeze-moe-router has no effect: toy has no experts
--encoder-recompute chunk => has no effect: the vision tower is frozen
--stage warmup --reference-offload host => is frozen, hence shared with the policy
--reference-offload vit => the vit is frozen, hence shared with the policy
--train-modules vit --reference-offload host => is frozen, hence shared with the policy
--lr-mult connector_16x => expected MODULE=FACTOR
--lr-mult connector_8x=2 => unknown module; did you mean 'connector_
--lr-mult vit=2 => has no effect: vit is frozen
--lr-mult connector_16x=fast => the factor is 'fast', expected a number above 0
--lr-mult connector_16x=0 => expected a number above 0
--lr-mult connector_16x=2 connector_16x=3 => names connector_16x twice

--max-tiles-per-pack 12 => less than the 13 tiles of one large image
8b --seq-length 2048 => (13 tiles of 256); use 3840 or more, or --max-dynamic-patch 5.
--eval-interval 5 => --eval-interval 5 has no effect without --valid-data-path
--eval-iters 5 => --eval-iters 5 has no effect without --valid-data-path
--num-workers 0 --prefetch-steps 4 => --prefetch-steps 4 has no effect without workers
--data-cache-dir x => --data-cache-dir x and --data-cache-gb None belong together; set both
--data-path a --data-cache-dir x --data-cache-gb 1 => --data-cache-dir x has no effect

38b TP=16 @16 => TP 16 does not divide num_query_groups 8 of internvl3_5-38b; use 1, 2, 4 or 8.
8b TP=5 SP @5 => 5 does not divide num_query_groups 8 of internvl3_5-8b; use 2, 4 or 8.
30b TP=2 EP=8 @16 => TP 2 with the experts of internvl3_5-30b-a3b needs SP; add it.
SP => TP is 1; leave it out, or use 2 or more.
8b EP=2 @2 => EP 2 has no effect: internvl3_5-8b has no experts; leave it out.
8b ETP=1 => ETP 1 has no effect
8b --moe-aux-loss-coeff 0.1 => --moe-aux-loss-coeff has no effect: internvl3_5-8b has no experts
8b --moe-z-loss-coeff 0.1 => --moe-z-loss-coeff has no effect: internvl3_5-8b has no experts
30b EP=3 @3 => EP 3 does not divide the 128 experts of internvl3_5-30b-a3b; use 1, 2, 4, 8, 16, 32,
30b ETP=5 @5 => ETP 5 does not divide moe_ffn_hidden_size 768 of internvl3_5-30b-a3b; use 1, 2, 3,
8b PP=5 @5 => the 36 layers of internvl3_5-8b cannot be shared equally by PP 5
241b PP=8 @8 => use 1, 2, 47 or 94, or count embedding and loss as layers: EMBEDDING LOSS.
8b PP=37 @37 => 12, 18 or 36, or count the loss as a layer: LOSS.
8b PP=4 FIRST=7 @4 => (with FIRST); use 2 or 30, or use FIRST and LAST.
8b PP=4 FIRST=6 EMBEDDING LOSS @4 => FIRST are two ways to make stages uneven, and megatron-core
8b PP=2 FIRST=30 LAST=30 @2 => (with FIRST, LAST); use FIRST and LAST.
8b PP=4 VPP=2 @4 => VPP 2 does not divide the 9 layers of a pipeline stage; use 1 or 3, or leave
8b PP=4 VPP=9 @4 => VPP 9 is all layers of a pipeline stage, so that nothing interleaves; use 1 or 3
8b PP=36 VPP=1 @36 => VPP 1 is all layers of a pipeline stage, so that nothing interleaves; leave it
8b PP=4 FIRST=8 LAST=8 VPP=2 @4 => into 5 chunks, and FIRST 8 cannot be cut into as many; use 5, or
8b VPP=2 => VPP has no effect: PP is 1; leave it out.
8b EMBEDDING LOSS => EMBEDDING has no effect: PP is 1; leave it out.
8b PP=4 VPP=3 LAYOUT=t*36 @4 => names the layers of every stage; leave out VPP,
8b PP=2 LAYOUT=Et*36|L|L @2 => does not lay 36 layers out on 2 pipeline stages
8b PP=2 LAYOUT=| @2 => write one part a stage (or chunk), in order, separated by |
8b PP=2 LAYOUT=Et*30|t*5L @2 => does not lay 36 layers out
8b PP=2 LAYOUT=Ex*36|L @2 => Invalid layer character: x
8b CP=4 --seq-length 4 --max-dynamic-patch 1 @4 => less than the 256 visual tokens
CP=64 --seq-length 64 --max-dynamic-patch 1 @64 => multiple of 128 tokens, more than
8b CP=2 --cp-comm-type all_gather @2 => packed documents are exchanged in a ring only; use p2p
8b --cp-comm-type p2p => --cp-comm-type has no effect: CP is 1
8b TP=4 @6 => 6 is not a multiple of tensor 4 x pipeline 1 x context 1 = 4 ranks; use 4 or 8 ranks,
8b TP=2 CP=3 @9 => tensor 2 x pipeline 1 x context 3 = 6 ranks; use 6 or 12 ranks, or smaller sizes.
8b PP=4 @2 => use 4 ranks, or smaller sizes.
30b EP=2 ETP=3 @4 => world size 4 is not a multiple of EP 2 x ETP 3 x PP 1 = 6; use 6 ranks
30b TP=2 EP=8 SP @8 => EP 8 x ETP 2 x PP 1 = 16; use 16 ranks
BATCH=250 @16 => BATCH 250 is not a multiple of the data-parallel size 16 (16 ranks over tensor 1 x
8b BATCH=12 @8 => use 8 or 16.
8b PP=4 VPP=3 BATCH=6 @4 => and there are 6 (BATCH 6 over 1 data-parallel ranks); use BATCH 4 or 8,
8b PP=4 VPP=3 BATCH=12 @8 => of PP 4, and there are 6 (BATCH 12 over 2
8b PP=2 LAYOUT=Et*9|t*9|t*9|t*9L BATCH=3 @2 => groups of PP 2, and there are 3
8b PP=4 VPP=3 GROUP=2 @4 => GROUP 2 is less than PP 4; use 4 or more.
8b PP=4 VPP=3 GROUP=6 BATCH=8 @4 => of GROUP 6, and there are 8 (BATCH 8 over 1
8b PP=4 GROUP=4 @4 => GROUP has no effect without interleaving (VPP)

--recompute-method uniform => belong to --recompute-granularity full, found None
--recompute-granularity full => add --recompute-method uniform --recompute-num-layers 1
8b PP=4 FULL=10 @4 => more than the 9 layers of a pipeline stage
8b PP=4 VPP=3 FULL=4 @4 => more than the 3 layers of a chunk of a pipeline stage (3 chunks a stage)
--recompute-modules mlp => belongs to --recompute-granularity selective, found None
SELECTIVE core_atn => did you mean 'core_attn'?
8b SELECTIVE moe => has no effect on internvl3_5-8b; use mlp
30b SELECTIVE mlp => has no effect on internvl3_5-30b-a3b; use moe
30b SELECTIVE moe_act => needs --moe-grouped-gemm
--min-lr 1 => --min-lr 1.0 is more than --lr 4e-06
--lr-warmup-iters 100 => leaves nothing of the 100 steps of decay
--overlap-param-gather @2 => needs --use-distributed-optimizer and --overlap-grad-reduce
--overlap-param-gather --use-distributed-optimizer @2 => needs --use-distributed-optimizer and
--exp-avg-dtype bf16 => --exp-avg-dtype bf16 needs --use-precision-aware-optimizer
--use-precision-aware-optimizer => needs --use-distributed-optimizer
--optimizer-cpu-offload => moves nothing without --optimizer-offload-fraction
--fp8-format hybrid => --fp8-format hybrid needs --bf16
--fp8-format hybrid --bf16 --attention sdpa => use --attention auto
--fp8-param-gather => --fp8-param-gather has no effect without --fp8-format
--fp8-max-reference-kl 0.1 => --fp8-max-reference-kl has no effect without --fp8-format
--bf16 --fp8-format e4m3 --fp8-max-reference-kl 0 => expected more than 0
--bf16 --fp8-format e4m3 --fp8-param-gather => needs --use-distributed-optimizer
--stage pretrain --bf16 --fp8-format e4m3 --fp8-max-reference-kl 1 => no effect in stage 'pretrain'
--offload-modules core_attn => belong together
--ckpt-step 3 => chooses a step of --load
--override-data-state => is about a run that goes on, but --load is not set
--save-interval 3 => --save-interval 3 needs --save
--keep-last 2 => --keep-last 2 needs --save; set it to a folder
--profile => --profile writes to <save>/trace, but --save is not set
--profile-step-end 3 => --profile-step-end has no effect without --profile
--save x --profile --profile-step-start 12 => expected more than --profile-step-start, 12
--save x --profile --profile-ranks 0 1 => the run has ranks 0 to 0
--save x --train-iters 3 --profile => --profile-step-end 12 is never reached: --train-iters is 3
"""


def case(line: str) -> tuple[str, int]:
    """Its words and ranks."""
    words, _, ranks = line.partition("@")
    return words, int(ranks or 1)


@pytest.mark.parametrize("line", GOOD.strip().splitlines())
def test_good_runs(line: str) -> None:
    words, ranks = case(line)
    validate(run(words), ranks)


@pytest.mark.parametrize("line", [line for line in BAD.splitlines() if line])
def test_bad_runs(line: str) -> None:
    given, _, message = line.partition(" => ")
    words, ranks = case(given)
    with pytest.raises(ConfigError) as error:
        validate(run(words), ranks)
    assert long(message) in str(error.value)


@pytest.mark.parametrize("size", [name for name in MODELS if name.startswith("internvl")])
def test_tensor_and_pipeline_sizes_that_are_offered_do_work(size: str) -> None:
    for words in ("SP TP=3", "PP=11"):
        name, wanted = words.split("=")
        with pytest.raises(ConfigError) as error:
            validate(run(f"--model-size {size} {words}"), int(wanted))
        offered = re.search(r"use ([\d, or]+)[.,]", str(error.value))
        assert offered is not None
        for number in re.findall(r"\d+", offered[1]):
            validate(run(f"--model-size {size} {name}={number} BATCH={number}"), int(number))


def test_each_stage_trains_by_default_what_it_may_train() -> None:
    for spec in STAGES.values():
        assert set(spec.train_modules) <= set(spec.trainable)


def test_what_the_trainer_or_megatron_core_would_refuse_is_refused_before_it_runs() -> None:
    for words in (
        "8b TP=2 SP PP=2 VPP=3 CP=2",
        "30b EP=2 --freeze-moe-router",
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather FULL=1",
    ):
        check_environment(run(words))
    with pytest.raises(ConfigError, match="e4m3 needs TransformerEngine and a GPU"):
        check_environment(run("--bf16 --fp8-format e4m3"))
    with pytest.raises(ConfigError, match=r"refuses these flags: .*requires FusedAdam from Transf"):
        check_environment(run("--use-distributed-optimizer --use-precision-aware-optimizer"))
    cfg = run("8b TP=2 SP FULL=1 --distribute-saved-activations")
    validate(cfg, 2)
    with pytest.raises(ConfigError, match="core refuses these flags: distribute_saved_activations"):
        check_environment(cfg)


REMARKS = """
--use-distributed-optimizer @2 =>
--use-distributed-optimizer => no effect with one data-parallel rank
8b TP=2 --use-distributed-optimizer @2 =>
8b TP=2 --overlap-grad-reduce @2 => --overlap-grad-reduce: no effect
8b TP=2 --use-distributed-optimizer --train-modules language_model @2 => no effect
8b CP=4 @4 => padded to a multiple of 8 tokens
30b --freeze-moe-router --moe-aux-loss-coeff 0.1 @2 => each router
PP=8 BATCH=8 @8 => 8 microbatches on 8 pipeline stages
--save none => no checkpoint
"""


@pytest.mark.parametrize("line", REMARKS.strip().splitlines())
def test_remarks(line: str) -> None:
    given, _, message = line.partition(" =>")
    words, ranks = case(given)
    found = " ".join(remarks(run(f"--save x {words}"), ranks))
    assert message.strip() in found
    assert bool(message) == bool(found)


FILES = """
 => --data-path is not set
--data-path HERE => --tokenizer-model is not set
--data-path 2 gone TOKENIZER --load HERE => --data-path gone: no such file
--data-path 0.5 HERE 2 TOKENIZER --load HERE => --data-path: no folder after 2
--data-path HERE TOKENIZER => stage 'consistency' has nothing to start from
--data-path HERE TOKENIZER --stage router --load HERE => stage 'router' needs --reference-load
--data-path HERE TOKENIZER --pretrained-checkpoint gone => gone: no such file or folder
--data-path qq://a TOKENIZER --load HERE => qq://a: fsspec cannot open it
--data-path HERE TOKENIZER --load HERE --valid-data-path HERE gone => --valid-data-path gone: no
--data-path HERE TOKENIZER --load HERE --valid-data-path HERE 2 => --valid-data-path: no folder
--data-path HERE TOKENIZER --stage pretrain --load HERE => holds no checkpoint to resume from
--data-path HERE TOKENIZER --pretrained-checkpoint HERE =>
--data-path HERE TOKENIZER --stage pretrain =>
--data-path memory://a TOKENIZER --stage pretrain =>
--data-path 0.5 HERE memory://bucket/folder TOKENIZER --stage pretrain =>
"""  # whether a URL is there is said when it is read


@pytest.mark.parametrize("line", FILES.strip("\n").splitlines())
def test_files_are_asked_for_when_a_run_starts(line: str, tmp_path: Path) -> None:
    words, _, message = line.partition(" =>")
    words = words.replace("TOKENIZER", "--tokenizer-model HERE").replace("HERE", str(tmp_path))
    cfg = run(words)
    validate(cfg, 1)
    if not message:
        check_files(cfg)
        return
    with pytest.raises(ConfigError) as error:
        check_files(cfg)
    assert message.strip() in str(error.value)


def test_on_a_gpu_the_distributed_optimizer_needs_an_adam_that_can_be_resumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", True)
    check_environment(run("--use-distributed-optimizer"))  # a CPU has the stand-in's
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_environment(run(""))
    with pytest.raises(ConfigError, match=r"--use-distributed-optimizer: .*install TransformerEng"):
        check_environment(run("--use-distributed-optimizer"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConfigError, match="install gcc: Triton and torch"):
        check_environment(run(""))
