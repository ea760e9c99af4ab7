"""Checks before a run that open files or import megatron-core; see also config/validate.py."""

import importlib.util
from pathlib import Path

from megatron_vico.checkpoint.ownership import check_save_folder
from megatron_vico.checkpoint.run_folder import (
    has_checkpoint,
    read_metadata,
    refuse_hugging_face,
    resolve_model,
)
from megatron_vico.config.config_json import differences
from megatron_vico.config.gpus import compiler_trouble
from megatron_vico.config.megatron_kwargs import megatron_kwargs
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import RunConfig
from megatron_vico.convert.open import megatron_source
from megatron_vico.convert.source import check_whole
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import load_tokenizer
from megatron_vico.data.shards.mixture import read_mixture
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.data.shards.storage import check_url, is_url
from megatron_vico.errors import ConfigError
from megatron_vico.files import refuse_missing


def check_files(cfg: RunConfig) -> None:
    """Raise if what the stage needs is not named or not there, or --save is another run's folder.

    Also if it is this run's own, that would be overwritten.

    Raises:
        ConfigError: naming the flag.
        CheckpointError: naming the folder of --save or --load.
    """
    stage = cfg.stage.stage
    if not cfg.data.data_path:
        raise ConfigError(
            "--data-path is not set: give one or more folders made by `vico shards make`."
        )
    if cfg.data.tokenizer_model is None:
        raise ConfigError(
            "--tokenizer-model is not set: give a Hugging Face tokenizer folder or a .model file."
        )
    if cfg.stage.spec.needs_reference and not (
        cfg.checkpoint.pretrained_checkpoint or cfg.checkpoint.load
    ):
        raise ConfigError(
            f"stage {stage!r} has nothing to start from: give --pretrained-checkpoint (made by"
            " `vico convert` or by the stage before), or --load to resume."
        )
    if cfg.stage.spec.reference == "named" and cfg.stage.reference_load is None:
        raise ConfigError(
            f"stage {stage!r} needs --reference-load: the checkpoint from before consistency"
            " training, which the policy is compared with."
        )
    paths = {
        "--tokenizer-model": (cfg.data.tokenizer_model,),
        "--data-path": tuple(
            folder.path for folder in read_mixture(cfg.data.data_path, options=cfg.data)
        ),
        "--valid-data-path": tuple(
            folder.path
            for folder in read_mixture(
                cfg.data.valid_data_path, flag="--valid-data-path", options=cfg.data
            )
        ),
        "--pretrained-checkpoint": (cfg.checkpoint.pretrained_checkpoint,),
        "--reference-load": (cfg.stage.reference_load,),
    }
    for flag, given in paths.items():
        for path in given:
            if flag.endswith("data-path") and path is not None and is_url(path):
                check_url(path)
            else:
                refuse_missing(flag, path)
    _check_run_folders(cfg)


def _check_run_folders(cfg: RunConfig) -> None:
    load, save = (
        None if path is None else Path(path).resolve()
        for path in (cfg.checkpoint.load, cfg.checkpoint.save)
    )
    if load is not None:
        refuse_hugging_face(load)
    # The folder of --save is empty when a run that is to be resumed begins.
    if load is not None and load != save and not has_checkpoint(load):
        raise ConfigError(
            f"--load {cfg.checkpoint.load} holds no checkpoint to resume from (looked from"
            f" {Path.cwd()}); correct it, or begin at step 0 with --load none."
        )
    if save is not None:
        check_save_folder(cfg, model_name=resolve_model(cfg).name)


def check_contents(cfg: RunConfig) -> None:
    """Raise unless checkpoints, tokenizer and shards belong together, as far as headers say."""
    files, model = cfg.checkpoint, resolve_model(cfg)
    load = files.load if files.load is not None and Path(files.load).exists() else None
    for flag, folder in (
        ("--load", load),
        ("--pretrained-checkpoint", files.pretrained_checkpoint),
        ("--reference-load", cfg.stage.reference_load),
    ):
        if folder is not None:
            _check_checkpoint(flag, Path(folder), model, cfg)
    assert cfg.data.tokenizer_model is not None
    tokenizer = load_tokenizer(cfg.data.tokenizer_model)
    tokenizer.check_fits(model)
    settings = EncodingSettings.from_options(cfg.data, image_size=model.vision.image_size)
    for paths in (cfg.data.data_path, cfg.data.valid_data_path):
        for each in read_mixture(paths) if paths else ():
            if not is_url(each.path):
                shards = ShardFolder.open(each.path, options=cfg.data)
                shards.check_encoding(tokenizer=tokenizer, settings=settings)


def _check_checkpoint(flag: str, folder: Path, model: ModelConfig, cfg: RunConfig) -> None:
    """One that is no run's, of another model or with other tensors; or a run that has ended."""
    refuse_hugging_face(folder)
    resumes = flag == "--load"
    if resumes and not has_checkpoint(folder):
        return  # nothing to resume yet
    step = cfg.checkpoint.ckpt_step if resumes else None
    found = read_metadata(folder, step)
    if differing := differences(found.model, model):
        raise ConfigError(
            f"{flag} {folder} is of {found.model.name}, this run is of {model.name}:"
            f" {'; '.join(differing)}; set --model-size, or give another checkpoint."
        )
    check_whole(megatron_source(folder, iteration=step))
    if resumes and found.iteration >= cfg.training.train_iters:
        raise ConfigError(
            f"--load {folder} has done {found.iteration} steps and --train-iters is"
            f" {cfg.training.train_iters}: nothing is left to train. Raise --train-iters to go on,"
            " or begin the next stage with it as --pretrained-checkpoint."
        )
    if resumes and not found.has_optimizer:
        raise ConfigError(
            f"--load {folder} holds weights only, so that no run can be resumed from it; give it as"
            " --pretrained-checkpoint."
        )


def check_environment(cfg: RunConfig) -> None:
    """ConfigError for what `validate` accepts and trainer or megatron-core would refuse later."""
    if cfg.checkpoint.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"--wandb-project {cfg.checkpoint.wandb_project}: wandb is not installed; `pip install"
            " wandb`, or leave the flag out."
        )
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig

    if torch.cuda.is_available() and (trouble := compiler_trouble()):
        raise ConfigError(f"{trouble}: Triton and torch.compile need it on a GPU.")

    from megatron_vico.models.build import language_transformer_config, transformer_engine_usable
    from megatron_vico.training.optimizer import optimizer_config

    if cfg.parallel.fp8_format is not None and not transformer_engine_usable():
        raise ConfigError(
            f"--fp8-format {cfg.parallel.fp8_format} needs TransformerEngine and a GPU: `vico"
            " doctor` says what is missing; leave it out to train in bf16."
        )
    try:
        language_transformer_config(resolve_model(cfg), cfg)
        optimizer_config(cfg)
        DistributedDataParallelConfig(**megatron_kwargs(cfg, DistributedDataParallelConfig))
    except ConfigError:
        raise
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"megatron-core refuses these flags: {' '.join(str(error).split())}"
        ) from error
