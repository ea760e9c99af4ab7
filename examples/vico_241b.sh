#!/usr/bin/env bash
# ViCO training of InternVL3.5-241B-A28B on a SLURM cluster: 16 nodes of 8 H200 for warm-up and
# consistency training, 2 of them for the router. torchrun on each node, started by srun. It has run
# toys on a SLURM of two virtual nodes of one machine, on CPUs: three stages; SIGTERM, the time
# limit and preemption with the requeue after them; a killed rank; layouts and paths that cannot
# work. It has not seen GPUs or a real cluster yet.
#
#   CHECK=1 examples/vico_241b.sh                     are the layouts right? needs no SLURM, no GPU
#   sbatch examples/vico_241b.sh                      all three stages, one after the other
#   sbatch examples/vico_241b.sh warmup consistency   some of them; the router is better off in a
#                                                     job of its own:
#   sbatch --nodes=2 --dependency=afterok:JOB examples/vico_241b.sh router
#   sbatch examples/vico_241b.sh consistency -- --lr 2e-6
#                                                     after --: flags of `vico train`, every stage
#
# Submit from the repository's root: the recipes' paths (checkpoints/internvl3_5-241b-a28b...) are
# relative to it, and must be on a file system that all nodes share. `vico convert` makes the first
# of them. A stage that is started again goes on from its own last checkpoint; a stage that is done
# is skipped.
#
# Environment:
#   DATA           folder of shards made by `vico shards make`    (needed, but not for CHECK=1)
#   TOKENIZER      tokenizer folder of an InternVL3.5 checkpoint  (needed, but not for CHECK=1)
#   PYTHON         that has megatron_vico and TransformerEngine   (.venv/bin/python)
#   RECIPES        folder of {warmup,consistency,router}.yaml     (those of 241B-A28B)
#   GPUS_PER_NODE  ranks a node; also `sbatch --gpus-per-node=N`  (8)
#   NODES          nodes of warm-up and consistency training      (what SLURM gave; else 16)
#   ROUTER_NODES   nodes of the router stage                      (2)
#   PORT           of the rendezvous on the first node            (29500)
#   CHECK          1: check the layouts of the stages, and stop   (0)

#SBATCH --job-name=vico-241b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# SIGTERM to all processes of the running step 15 minutes before the time is over, as preemption
# does when it begins: the trainer finishes its step (about a minute), saves (some 3 TB in all), and
# ends. The job is then put in line again.
#SBATCH --signal=TERM@900
#SBATCH --requeue

set -euo pipefail

# SLURM runs a copy of this file, so the repository is where the job was submitted.
ROOT=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
RECIPES=${RECIPES:-examples/recipes/internvl3_5_241b_a28b}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
NODES=${NODES:-${SLURM_JOB_NUM_NODES:-16}}
ROUTER_NODES=${ROUTER_NODES:-2}
PORT=${PORT:-29500}
CHECK=${CHECK:-0}

stages=()
flags=()
while (($#)); do
    case $1 in
        warmup | consistency | router) stages+=("$1") ;;
        --) shift && flags=("$@") && break ;;
        *)
            echo "vico_241b.sh: unknown stage '$1', expected warmup, consistency, router," \
                "or -- and flags" >&2
            exit 2
            ;;
    esac
    shift
done
((${#stages[@]})) || stages=(warmup consistency router)
cd "$ROOT"

nodes_of() { # STAGE
    if [[ $1 == router ]]; then echo "$ROUTER_NODES"; else echo "$NODES"; fi
}

vico() { # STAGE WORD...: `vico train` with the stage's recipe and the user's flags
    "$PYTHON" -W ignore -m megatron_vico train --recipe "$RECIPES/$1.yaml" "${@:2}" \
        ${flags[@]+"${flags[@]}"}
}

# An error ends the job here with one line, before 128 processes say it each.
check() { # STAGE layout|files WORD...
    vico "$1" --check "$2" --world-size "$(($(nodes_of "$1") * GPUS_PER_NODE))" "${@:3}"
}

for stage in "${stages[@]}"; do check "$stage" layout; done
if [[ $CHECK == 1 ]]; then exit 0; fi

: "${SLURM_JOB_ID:?not inside a SLURM job: submit with sbatch, or set CHECK=1 to check the layouts}"
: "${DATA:?set DATA to the folder of shards}" "${TOKENIZER:?set TOKENIZER to the tokenizer folder}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${hosts%%$'\n'*}
# Preemption's SIGTERM may reach this shell as well; were it to end, the step could not save.
trap '' TERM

# One hardware queue a GPU: kernels start in the order they were issued, so that the communication
# of tensor and sequence parallelism begins before the product that it hides behind (Megatron asks
# for it on Hopper).
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Packs have unequal lengths: receive buffers of many sizes would fragment fixed segments.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# When a peer dies or a collective exceeds --distributed-timeout-minutes, NCCL's watchdog ends the
# process instead of leaving it in a kernel that never returns. 3 is PyTorch's default (end without
# aborting the communicators, which could itself hang); stated, since clusters' profiles switch it
# off.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
export OMP_NUM_THREADS=1

launch() { # STAGE
    # A rank that dies ends its node's torchrun, which gives the node's other ranks 30 s; then
    # --kill-on-bad-exit ends the other nodes, whose ranks may wait in collectives and know nothing:
    # SIGTERM, and SIGKILL after SLURM's KillWait (30 s unless the cluster says otherwise). So it
    # takes about a minute where nobody notices, seconds where they do. --cpu-bind=none: one task a
    # node, but its 8 ranks and their loaders need all cores. The agents ignore SIGTERM (an ignored
    # signal stays so across exec): one that obeyed would give its ranks 30 s to save, and kill
    # them. The trainer sets a handler of its own, so SLURM's signal reaches it all the same.
    # The inner shell expands its own arguments, and SLURM_NODEID, which differs per node.
    # shellcheck disable=SC2016
    srun --nodes="$(nodes_of "$1")" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
        bash -c 'trap "" TERM; exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' \
        "$PYTHON" --nnodes="$(nodes_of "$1")" --nproc-per-node="$GPUS_PER_NODE" \
        --master-addr="$head_node" --master-port="$PORT" \
        --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
        -m megatron_vico train --recipe "$RECIPES/$1.yaml" \
        --data-path "$DATA" --tokenizer-model "$TOKENIZER" \
        ${flags[@]+"${flags[@]}"}
}

is_done() { # STAGE: whether its last checkpoint is the one of its last step
    local config folder wanted found
    config=$(vico "$1" --print-config)
    folder=$(sed -n 's/^save: //p' <<<"$config")
    wanted=$(sed -n 's/^train_iters: //p' <<<"$config")
    [[ -e $folder/latest_checkpointed_iteration.txt ]] || return 1
    found=$("$PYTHON" -W ignore -m megatron_vico checkpoint "$folder" |
        sed -n 's/^ *iteration: //p')
    [[ $found == "$wanted" ]]
}

for stage in "${stages[@]}"; do
    if is_done "$stage"; then
        echo "vico_241b.sh: $stage is done already" >&2
        continue
    fi
    check "$stage" files --data-path "$DATA" --tokenizer-model "$TOKENIZER" >/dev/null
    launch "$stage" # its failure is the job's: no requeue, the cause is in the log
    if ! is_done "$stage"; then
        echo "vico_241b.sh: $stage was told to stop and has saved; the job goes back in line" >&2
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
done
