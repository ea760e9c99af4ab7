# What NCCL, torch and TransformerEngine are told, and why; sourced by vico.sh in a job. What is set
# already wins, but for the two that would make a run wrong or endless.
# shellcheck shell=bash

# One hardware queue a GPU: kernels start in the order they were issued, so that the communication
# of tensor and sequence parallelism begins before the product that it hides behind (Megatron asks
# for it on Hopper).
export CUDA_DEVICE_MAX_CONNECTIONS=1
# When a peer dies or a collective exceeds --distributed-timeout-minutes, NCCL's watchdog ends the
# process instead of leaving it in a kernel that never returns. 3 is PyTorch's default (end without
# aborting the communicators, which could itself hang); stated, since clusters' profiles switch it
# off.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3

# Packs have unequal lengths: receive buffers of many sizes would fragment fixed segments.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# NCCL is silent by default; WARN names the peer, network card or driver that failed.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# On a timeout torch writes which collective each rank was in: beside the ranks' logs, not on the
# nodes' /tmp, which goes with the job.
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$LOGS/$attempt-collectives-rank-}
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$TORCH_FR_DUMP_TEMP_FILE}
# 1 lets TransformerEngine take cuDNN's faster attention backward, whose sums have no fixed order: a
# resumed run then differs in the last digits. 0 gives it back bit for bit.
export NVTE_ALLOW_NONDETERMINISTIC_ALGO=${NVTE_ALLOW_NONDETERMINISTIC_ALGO:-1}
# 8 ranks and their loaders share a node's cores: one that took all of them would slow the others.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Lines of the log as they come, also those before a SIGKILL.
export PYTHONUNBUFFERED=1
