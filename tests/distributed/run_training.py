"""Trains a list of configurations and tells how each ended on each rank; for torchrun.

Usage: run_training.py FOLDER, with FOLDER/configs.pkl, a pickled list of RunConfig. Writes
FOLDER/told.json: of each configuration, what each rank's SampleError said, or null.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

from megatron_vico import cpu_stand_in


def main() -> None:
    """Train every configuration with one set of process groups."""
    cpu_stand_in.install()
    import torch

    from megatron_vico.errors import SampleError
    from megatron_vico.parallel.groups import started
    from megatron_vico.training.trainer import train

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    configs = pickle.loads((folder / "configs.pkl").read_bytes())
    told = []
    with started(configs[0].parallel, seed=1, timeout_minutes=2):
        for cfg in configs:
            message = None
            try:
                train(cfg)
            except SampleError as error:
                message = str(error)
            all_ranks: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(all_ranks, message)
            told.append(all_ranks)
        if torch.distributed.get_rank() == 0:
            (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
