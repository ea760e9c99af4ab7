#!/usr/bin/env bash
# Runs the cases of a table (cases.tsv says how it looks), each for a few steps, on a SLURM cluster:
# an array job for each number of nodes. tools/scaling_report.py makes a table and plots of them.
#
#   examples/scaling/sweep.sh CASES.tsv [FLAG ...]            submit; FLAGs are for every case
#   LOCAL=1 examples/scaling/sweep.sh CASES.tsv [FLAG ...]    on this machine, one after the other
#   python tools/scaling_report.py runs/scaling --plot scaling.png
#
# Each case leaves metrics.jsonl, config.yaml and plan.json (`vico plan`) in RUNS/SERIES/NAME, and no
# checkpoint. A case that cannot work or does not fit is named and left out. Submit from the
# repository's root. It has run toys on CPUs, also as arrays of a SLURM of two virtual nodes
# (`make test-slurm`); neither GPUs nor a real cluster have seen it.
#
# Environment:
#   RUNS           folder of the results                       (runs/scaling)
#   STEPS          steps of a case                             (20)
#   GPUS_PER_NODE  ranks a node                                (8)
#   GPU            kind of card that `vico plan` is asked for; none: CPUs, nothing is planned (h200)
#   MASTER_ADDR    of the rendezvous                           (the first node)
#   PYTHON         that has megatron_vico                      (.venv/bin/python)
#   SBATCH_...     SLURM's own, such as SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT

set -euo pipefail

RUNS=${RUNS:-runs/scaling}
STEPS=${STEPS:-20}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
GPU=${GPU:-h200}
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
table=${1:?"usage: sweep.sh CASES.tsv [FLAG ...]"}
shift
mapfile -t cases < <(grep -v -e '^#' -e '^[[:space:]]*$' "$table")

run_case() { # INDEX FLAG...
    local name series nodes recipe flags words
    IFS=$'\t' read -r name series nodes recipe flags <<<"${cases[$1]}"
    shift
    read -ra words <<<"$flags"
    local save=$RUNS/$series/$name ranks=$((nodes * GPUS_PER_NODE))
    local run=(--recipe "$recipe" "${words[@]}" "$@" --train-iters "$STEPS" --save "$save"
        --save-interval 0 --log-interval 1)
    mkdir -p "$save"
    if [[ $GPU != none ]] && ! "$PYTHON" -W ignore -m megatron_vico plan --gpu "$GPU" \
        --world-size "$ranks" --quick --json "$save/plan.json" "${run[@]}" \
        >"$save/plan.txt" 2>&1; then
        echo "sweep.sh: $series/$name is left out: $(tail -n 1 "$save/plan.txt")" >&2
        return
    fi
    echo "sweep.sh: $series/$name on $ranks ranks"
    if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
        "$PYTHON" -W ignore -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
            -m megatron_vico train "${run[@]}" >"$save/log.txt" 2>&1 ||
            echo "sweep.sh: $series/$name failed: $(tail -n 1 "$save/log.txt")" >&2
        return
    fi
    # One hardware queue a GPU, so that communication begins before the product it hides behind;
    # packs of many sizes would fragment fixed segments.
    export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
    local head_node
    head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # shellcheck disable=SC2016 # the inner shell knows SLURM_NODEID, which differs per node
    srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
        bash -c 'exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' \
        "$PYTHON" --nnodes="$nodes" --nproc-per-node="$GPUS_PER_NODE" \
        --master-addr="${MASTER_ADDR:-$head_node}" \
        --master-port="$((20000 + SLURM_JOB_ID % 20000))" \
        -m megatron_vico train "${run[@]}"
}

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    run_case "$SLURM_ARRAY_TASK_ID" "$@"
elif [[ ${LOCAL:-0} == 1 ]]; then
    for index in "${!cases[@]}"; do run_case "$index" "$@"; done
else
    mkdir -p "$RUNS"
    for nodes in $(printf '%s\n' "${cases[@]}" | cut -f 3 | sort -nu); do
        indices=()
        for index in "${!cases[@]}"; do
            [[ $(cut -f 3 <<<"${cases[$index]}") == "$nodes" ]] && indices+=("$index")
        done
        gpus=()
        if [[ $GPU != none ]]; then gpus=(--gpus-per-node="$GPUS_PER_NODE"); fi
        sbatch --job-name=vico-scaling --nodes="$nodes" --ntasks-per-node=1 --exclusive --mem=0 \
            "${gpus[@]}" --array="$(IFS=, && echo "${indices[*]}")" \
            --output="$RUNS/%A_%a.log" "$0" "$table" "$@"
    done
fi
