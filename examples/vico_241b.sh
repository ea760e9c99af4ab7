#!/usr/bin/env bash
# ViCO training of InternVL3.5-241B-A28B: slurm/vico.sh with this model's numbers, 16 nodes of 8
# H200 for warm-up and consistency training, 2 for the router. docs/slurm.md has the variables.
#
#   CHECK=1 examples/vico_241b.sh                     are the layouts right? needs no SLURM, no GPU
#   examples/vico_241b.sh --dry-run                   the jobs that would be submitted
#   examples/vico_241b.sh                             submit them, each after the one before
#   examples/vico_241b.sh router -- --lr 2e-4         some of them; after --: flags of `vico train`
#   sbatch examples/vico_241b.sh warmup consistency   several in one job

#SBATCH --job-name=vico-241b
#SBATCH --nodes=16
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@900
#SBATCH --requeue

set -euo pipefail
ROOT=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export RECIPES=${RECIPES:-examples/recipes/internvl3_5_241b_a28b} NAME=${NAME:-vico-241b}
export NODES=${NODES:-${SLURM_JOB_NUM_NODES:-16}} ROUTER_NODES=${ROUTER_NODES:-2}
exec bash "$ROOT/examples/slurm/vico.sh" "$@"
