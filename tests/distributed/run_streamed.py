"""Loads converted checkpoints under several layouts and saves them there; started by
test_streamed_checkpoint.py.

Usage: run_streamed.py FOLDER, by torchrun with 4 processes. FOLDER/SIZE is a Hugging Face folder of
each size; what is converted by all ranks goes to FOLDER/SIZE-megatron, what a layout saves to
FOLDER/SIZE-LAYOUT.
"""

import sys
from pathlib import Path

from megatron_vico import cpu_stand_in


def main() -> None:
    """All sizes; imports stand here because each save starts a process that imports this file
    again."""
    cpu_stand_in.install()
    import torch

    from megatron_vico.checkpoint import training_checkpoint
    from megatron_vico.config.registry import MODELS
    from megatron_vico.convert.convert import convert
    from megatron_vico.convert.options import ConversionOptions
    from tests.checkpoint_runs import make_training
    from tests.distributed.cached_layouts import CachedLayouts
    from tests.distributed.layouts_checkpoint import LAYOUTS
    from tests.distributed.test_streamed_checkpoint import LOADED_UNDER, MAX_SHARD_BYTES, odd_models

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    MODELS.update(odd_models())
    folder = Path(sys.argv[1])
    layouts = CachedLayouts()
    for size, names in LOADED_UNDER.items():
        megatron = convert(
            folder / size,
            output=folder / f"{size}-megatron",
            layout="megatron",
            options=ConversionOptions(max_shard_bytes=MAX_SHARD_BYTES, verify=True),
        )
        for name in names:
            groups = layouts.switch_to(LAYOUTS[name])
            # Other values before loading: what is not loaded shows.
            modules = make_training(size, groups=groups, seed=2, parallel=LAYOUTS[name]).modules
            training_checkpoint.load_weights(megatron, modules=modules, model_size=size)
            metadata = training_checkpoint.CheckpointMetadata(model_size=size, stage="pretrain")
            training_checkpoint.save_checkpoint(
                folder / f"{size}-{name}", 1, modules=modules, metadata=metadata
            )
    convert(folder / "base", output=folder / "start", layout="megatron")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
