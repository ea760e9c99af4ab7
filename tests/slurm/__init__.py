"""The SLURM launcher on a real SLURM of two virtual nodes; `make test-slurm`, no part of pytest."""
