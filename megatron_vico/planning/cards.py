"""GPUs that runs are planned for."""

CARDS = {"h100": 85.5e9, "h200": 150.8e9}
"""Bytes of each kind as its driver reports them: 81,559 and 143,771 MiB."""

RESERVE = 0.1
"""Share of a card for the CUDA context, NCCL's buffers and fragmentation."""
