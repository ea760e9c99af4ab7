"""Runs a list of stage configurations, one after the other, in one launch; started by torchrun from
the tests.

Usage: run_stages.py CONFIGS.pkl, a pickled list of RunConfig.
"""

import pickle
import sys
from pathlib import Path

from megatron_vico import cpu_stand_in


def main() -> None:
    """Train every configuration with one set of process groups."""
    cpu_stand_in.install()
    import torch

    from megatron_vico.parallel.groups import started
    from megatron_vico.training.trainer import train

    torch.set_num_threads(1)
    configs = pickle.loads(Path(sys.argv[1]).read_bytes())
    with started(configs[0].parallel, seed=1, timeout_minutes=2):
        for cfg in configs:
            train(cfg)


if __name__ == "__main__":
    main()
