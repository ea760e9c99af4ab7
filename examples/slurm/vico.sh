#!/usr/bin/env bash
# ViCO on SLURM, for every size and step: convert -> warmup -> consistency -> router -> export ->
# evaluate. Outside a job it submits one job a step, each after the one before; inside a job it
# does the steps that it is given. docs/slurm.md lists the variables that it reads.
#
#   vico.sh [--dry-run] [STEP...] [-- FLAG...]     FLAGs are those of `vico train`, for every stage
#
# Submit from the repository's root: the paths of recipes are relative to it, and must be on a file
# system that all nodes share.

set -euo pipefail

export RECIPES=${RECIPES:?the folder of warmup.yaml, consistency.yaml and router.yaml}
# SLURM runs a copy of this file, so the repository is where the job was submitted.
ROOT=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
export PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
export GPU=${GPU:-h200} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
export NODES=${NODES:-${SLURM_JOB_NUM_NODES:-1}} ROUTER_NODES=${ROUTER_NODES:-1}
export DATA=${DATA-} TOKENIZER=${TOKENIZER-} MODEL=${MODEL-} EXPORT=${EXPORT-}
export QUESTIONS=${QUESTIONS-} SCORES=${SCORES:-${EXPORT:-scores}-scores.json}
export CONVERT_FLAGS=${CONVERT_FLAGS-} EXPORT_FLAGS=${EXPORT_FLAGS-}
export EVALUATE_FLAGS=${EVALUATE_FLAGS-}
export NAME=${NAME:-vico} LOGS=${LOGS:-logs} TIME=${TIME:-24:00:00} SAVE_S=${SAVE_S:-900}
export SBATCH_FLAGS=${SBATCH_FLAGS-} SRUN_FLAGS=${SRUN_FLAGS-}
export MAX_CRASHES=${MAX_CRASHES:-3} PLAN=${PLAN:-1}
export CONTAINER=${CONTAINER-} MOUNTS=${MOUNTS:-$ROOT:$ROOT}

say() { echo "vico.sh: $*" >&2; }

in_turn=(convert warmup consistency router export evaluate)
steps=() flags=() dry_run=""
while (($#)); do
    case $1 in
        convert | warmup | consistency | router | export | evaluate) steps+=("$1") ;;
        --dry-run) dry_run=1 ;;
        --) shift && flags=("$@") && break ;;
        *)
            say "unknown stage '$1', expected ${in_turn[*]}, --dry-run, or -- and flags"
            exit 2
            ;;
    esac
    shift
done
if ((${#steps[@]} == 0)); then
    steps=(${MODEL:+convert} warmup consistency router ${EXPORT:+export} ${QUESTIONS:+evaluate})
fi
cd "$ROOT"

# How a process is started on one node, and what comes between srun and each rank.
read -ra srun_flags <<<"$SRUN_FLAGS"
alone=() inside=()
case $CONTAINER in
    "") ;;
    *.sif) inside=(apptainer exec --nv --bind "$MOUNTS" "$CONTAINER") && alone=("${inside[@]}") ;;
    *) # pyxis: an enroot image (.sqsh) or the name of one in a registry
        srun_flags+=("--container-image=$CONTAINER" "--container-mounts=$MOUNTS"
            "--container-workdir=$ROOT")
        alone=(srun --nodes=1 --ntasks=1 "${srun_flags[@]}")
        ;;
esac

vico() { "${alone[@]}" "$PYTHON" -W ignore -m megatron_vico "$@"; }
is_stage() { [[ $1 == warmup || $1 == consistency || $1 == router ]]; }

nodes_of() { # STEP
    case $1 in
        warmup | consistency) echo "$NODES" ;;
        router) echo "$ROUTER_NODES" ;;
        *) echo 1 ;;
    esac
}

of_stage() { # STAGE COMMAND WORD...: a command about the run of a stage
    vico "$2" "${@:3}" --recipe "$RECIPES/$1.yaml" "${flags[@]}"
}

check() { # STAGE layout|files WORD...: an error ends here with one line, before 128 ranks say it
    of_stage "$1" train --check "$2" --world-size "$(($(nodes_of "$1") * GPUS_PER_NODE))" "${@:3}"
}

state() { # STAGE FIELD
    of_stage "$1" status --get "$2" || (($? == 3)) # 3: steps are left
}

finished() { # STEP
    local status=0 folder
    case $1 in
        convert) folder=$(state warmup pretrained_checkpoint) || exit ;;
        export) folder=$EXPORT ;;
        evaluate) folder=$SCORES ;;
        *)
            of_stage "$1" status >/dev/null || status=$?
            ((status == 0 || status == 3)) || exit "$status"
            return "$status"
            ;;
    esac
    [[ -e $folder ]] && { [[ $1 == evaluate ]] || vico checkpoint "$folder" >/dev/null; }
}

needs() { # NAME STEP: a variable that a step cannot do without
    [[ -n ${!1} ]] || { say "$2 needs $1: see docs/slurm.md" && exit 2; }
}

for step in "${steps[@]}"; do
    if is_stage "$step"; then check "$step" layout; fi
done
if [[ ${CHECK:-0} == 1 ]]; then exit 0; fi
for step in "${steps[@]}"; do
    case $step in
        convert) needs MODEL "$step" ;;
        export) needs EXPORT "$step" && needs TOKENIZER "$step" ;;
        evaluate) needs EXPORT "$step" && needs QUESTIONS "$step" ;;
        *) needs DATA "$step" && needs TOKENIZER "$step" ;;
    esac
done

submit() { # STEP [JOB]: after JOB has ended well
    local words=(sbatch --parsable --job-name="$NAME-$1" --nodes="$(nodes_of "$1")"
        --output="$LOGS/%x-%j.log" --open-mode=append --time="$TIME" --exclusive --mem=0
        --requeue --signal="TERM@$SAVE_S")
    if [[ $GPU != none ]]; then words+=(--gpus-per-node="$GPUS_PER_NODE"); fi
    if [[ -n ${2-} ]]; then words+=(--dependency="afterok:$2" --kill-on-invalid-dep=yes); fi
    # shellcheck disable=SC2206 # words of the user
    words+=($SBATCH_FLAGS examples/slurm/vico.sh "$1" -- "${flags[@]}")
    if [[ -z $dry_run ]]; then "${words[@]}" && return || exit; fi
    printf '%q ' "${words[@]}" >&3 && echo >&3
    echo "JOB_$1"
}

if [[ -z ${SLURM_JOB_ID-} || -n $dry_run ]]; then
    exec 3>&1
    if [[ -z $dry_run ]]; then mkdir -p "$LOGS"; fi
    before=""
    for step in "${steps[@]}"; do
        if finished "$step"; then
            say "$step is done already"
        else
            before=$(submit "$step" "$before")
            if [[ -z $dry_run ]]; then echo "$step: job $before"; fi
        fi
    done
    exit 0
fi
mkdir -p "$LOGS"

# From here on, in a job. SIGTERM of a preemption reaches this shell and srun as well; were they to
# end, the ranks could not save.
trap '' TERM
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # jobs may share a node
attempt=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
# shellcheck source-path=SCRIPTDIR
source examples/slurm/environment.sh

ranks() { # STEP NODES TASKS_A_NODE WORD...: vico on every rank
    # A rank is a task of SLURM: signals reach the trainer, and one that dies ends the others, who
    # may wait in collectives and know nothing (SIGTERM, and SIGKILL after the cluster's KillWait).
    # --cpu-bind=none: a rank's loaders need more than one core.
    local status=0 log="$LOGS/$1-$attempt-rank"
    # shellcheck disable=SC2016 # the variables are each task's own
    srun --nodes="$2" --ntasks="$(($2 * $3))" --ntasks-per-node="$3" --cpu-bind=none \
        --kill-on-bad-exit=1 --output="$log-%t.log" --open-mode=append "${srun_flags[@]}" bash -c '
            export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
            trap : TERM # this shell waits for the rank, whatever the signal
            "${@:2}" && exit
            status=$?
            echo "$status" >"$1-$RANK.status" && exit "$status"' \
        rank "$log" "${inside[@]}" "$PYTHON" -m megatron_vico "${@:4}" || status=$?
    # The status of srun is 143 also where SLURM ended the other ranks after one had failed.
    if ((status == 0)) || ! compgen -G "$log-*.status" >/dev/null; then
        return "$status"
    elif grep -qxh -e 2 -e 130 "$log"-*.status; then
        return 2 # the user's to mend, or ended by the user
    elif grep -qxhv -e 75 -e 143 "$log"-*.status; then
        return 1
    fi
    return 75
}

again() { # WHY
    say "$1; the job goes back in line"
    scontrol requeue "$SLURM_JOB_ID" || exit 75 # what follows must not start
    exit 0
}

failed() { # STEP STATUS
    say "$1 failed with status $2; ranks' logs: $LOGS/$1-$attempt-rank-*.log; causes:"
    grep -h -E '^(rank [0-9]+: |[A-Za-z]+Error: )' "$LOGS/$1-$attempt"-rank-*.log |
        head -n 20 >&2 || true
}

train() { # STAGE
    local data=(--data-path "$DATA" --tokenizer-model "$TOKENIZER") nodes status=0 crashes at
    nodes=$(nodes_of "$1")
    check "$1" files "${data[@]}" >/dev/null
    # On each node, each time: the nodes may be others than before.
    local gpus=$GPUS_PER_NODE
    if [[ $GPU == none ]]; then gpus=0; fi
    ranks doctor "$nodes" 1 doctor --gpus "$gpus" || status=$?
    if ((status == 75)); then again "$1 was told to stop before it began"; fi
    ((status == 0)) || { failed doctor "$status" && exit 1; }
    if [[ $GPU != none && $PLAN == 1 && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
        of_stage "$1" plan --world-size "$((nodes * GPUS_PER_NODE))" --gpu "$GPU" --quick
    fi
    ranks "$1" "$nodes" "$GPUS_PER_NODE" train --recipe "$RECIPES/$1.yaml" "${data[@]}" \
        "${flags[@]}" || status=$?
    case $status in
        0) finished "$1" || again "$1 ended before its last step" ;; # --exit-interval
        75) again "$1 was told to stop" ;;
        2) failed "$1" 2 && exit 2 ;;
        *) # a rank or its node: again, but not for ever at the same step
            failed "$1" "$status"
            crashes=$LOGS/$1-$SLURM_JOB_ID.crashes at="step $(state "$1" iteration)"
            echo "$at" >>"$crashes"
            (($(grep -cx "$at" "$crashes") < MAX_CRASHES)) || exit "$status"
            again "$1 starts again from $at"
            ;;
    esac
}

# Conversions: the processes of a node share the work. Flags are words, not quoted.
# shellcheck disable=SC2086
run_step() { # STEP
    local folder
    case $1 in
        convert)
            folder=$(state warmup pretrained_checkpoint) || exit
            ranks "$1" 1 "$GPUS_PER_NODE" convert --from hf --to megatron --input "$MODEL" \
                --output "$folder" $CONVERT_FLAGS
            ;;
        export)
            folder=$(state router save) || exit
            ranks "$1" 1 "$GPUS_PER_NODE" convert --from megatron --to hf --layout flash \
                --input "$folder" --output "$EXPORT" --tokenizer-model "$TOKENIZER" $EXPORT_FLAGS
            ;;
        evaluate)
            ranks "$1" 1 1 evaluate --load "$EXPORT" --jsonl "$QUESTIONS" --output "$SCORES" \
                $EVALUATE_FLAGS
            ;;
    esac
}

for step in "${steps[@]}"; do
    if finished "$step"; then
        say "$step is done already"
    elif is_stage "$step"; then
        train "$step"
    else
        status=0
        run_step "$step" || status=$?
        case $status in
            0) ;;
            75) again "$step was told to stop" ;;
            *) failed "$step" "$status" && exit "$status" ;;
        esac
    fi
done
