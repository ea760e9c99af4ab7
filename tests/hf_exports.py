"""Models in memory as Hugging Face folders, by the writer that conversions use."""

from pathlib import Path

from megatron_vico.checkpoint.ranks import Ranks
from megatron_vico.config.registry import ModelConfig
from megatron_vico.convert.convert import write_hf
from megatron_vico.convert.huggingface.config import ExportOptions
from megatron_vico.convert.modules import canonical_state
from megatron_vico.convert.names.internvl import entries
from megatron_vico.convert.names.kinds import PaddedVocabulary
from megatron_vico.convert.options import ConversionOptions, Layout
from megatron_vico.convert.output_folder import new_folder
from megatron_vico.convert.source import Source, TensorInfo, check_whole, problems_with
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel


def export_hf(
    out_dir: Path,
    *,
    encoder: VisionEncoder,
    language_model: LanguageModel,
    model: ModelConfig,
    layout: Layout,
    tokenizer: Tokenizer | None = None,
    options: ExportOptions | None = None,
) -> Path:
    """Write a model, whole in this process; returns its folder."""
    tensors = canonical_state({"encoder": encoder, "language_model": language_model})
    rows = entries(model, layout="flash")
    for name, row in rows.items():
        if isinstance(row.kind, PaddedVocabulary):
            tensors[name] = tensors[name][: row.shape[0]]
    infos = {
        name: TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype)
        for name, tensor in tensors.items()
    }
    source = Source(
        model=model,
        where="a model in memory",
        tensors={name: infos[name] for name in rows},
        read_tensor=tensors.__getitem__,
        problems=problems_with(infos, rows),
    )
    with new_folder(out_dir) as folder:
        write_hf(
            folder,
            check_whole(source),
            layout=layout,
            tokenizer=tokenizer,
            export=options or ExportOptions(),
            options=ConversionOptions(),
            ranks=Ranks(),
        )
    return out_dir
