"""tools/trace_pipeline.py: its training commands are runs that work, and the picture is of what
they record."""

from pathlib import Path

from megatron_vico.config.flags import parse
from megatron_vico.config.validate import validate
from megatron_vico.training.preflight import check_environment
from megatron_vico.training.profiler import trace_folder
from tests.training_runs import load_tool


def test_the_commands_fit_each_other(tmp_path: Path) -> None:
    tool = load_tool("trace_pipeline")
    commands = list(tool.commands(tmp_path, tmp_path / "step.png", step=7))
    configs = [parse(words[words.index("train") + 1 :]) for words in commands if "train" in words]
    for cfg, ranks in zip(configs, (1, 4), strict=True):
        validate(cfg, ranks)
        check_environment(cfg)
    start, traced = configs
    assert traced.checkpoint.pretrained_checkpoint == start.checkpoint.save
    assert traced.training.profile_step_end == traced.training.train_iters == 7
    assert traced.checkpoint.save is not None
    plot = commands[-1]
    assert plot[plot.index("trace") + 1] == str(trace_folder(traced.checkpoint.save, 7))
