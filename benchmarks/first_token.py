#!/usr/bin/env python3
"""First tokens a second at 0, 25, 50 and 75 % fewer visual tokens (ViCO paper, Table 4, App. B).

    python benchmarks/first_token.py --base-url http://host:8000/v1 --model internvl --requests 2000
    python benchmarks/first_token.py --model-size internvl3_5-1b --layers 12 --requests 4

A request is an image of ten tiles (3x3 and the thumbnail) and 64 or 512 tokens of text, answered
with one token. Against an endpoint, OpenAI-style, --threads ask at once and all of a request is
timed; the plans are the names none, random=0.3333, random=0.6667 and all of `vico serve`, or those
that --models gives (LMDeploy has one model: measure twice, with its flash_mode on and off). Without
one, the parts are timed in this process, with random weights: ViT, router, and the language model
over 2560 (1 - c) visual tokens and the text; on a CPU in CPU time of one thread, the best of
--requests.
Speed-ups stand beside the paper's and beside the bound by FLOPs: of the language model alone, which
is what the paper's figures come near, and with the ViT, which compression does not make cheaper.
"""

import argparse
import base64
import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, only this folder is on the path

from megatron_vico.config.registry import MODELS, ModelConfig, get_model_config  # noqa: E402
from megatron_vico.training.flops import (  # noqa: E402
    attention_flops_per_token_squared,
    language_flops_per_token,
    vit_flops_per_tile,
)

TILES = 10
COMPRESSION = (0.0, 0.25, 0.5, 0.75)
PLANS = ("none", "random=0.3333", "random=0.6667", "all")
"""With three quarters of a compressed tile's tokens gone, a third of the tiles makes 25 %."""
TEXTS = (64, 512)
PAPER = {
    ("8B", 64): (1.00, 1.29, 1.97, 3.76),
    ("8B", 512): (1.00, 1.30, 1.76, 2.77),
    ("30B", 64): (1.00, 1.30, 1.99, 3.77),
    ("30B", 512): (1.00, 1.29, 1.80, 2.72),
    ("38B", 64): (1.00, 1.33, 1.99, 3.80),
    ("38B", 512): (1.00, 1.30, 1.77, 2.76),
    ("241B", 64): (1.00, 1.34, 2.00, 3.76),
    ("241B", 512): (1.00, 1.32, 1.81, 2.87),
}
"""Table 4."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of Table 4."""

    text_tokens: int
    compression: float
    """Share of visual tokens that is saved."""

    per_s: float
    """First tokens a second."""

    saved: float
    """Share that was saved, as measured."""


def bound(model: ModelConfig, *, text: int, compression: float, vit: bool) -> float:
    """Speed-up by FLOPs alone, everything at the same rate."""

    def cost(share: float) -> float:
        length = TILES * model.visual_tokens_per_tile * (1 - share) + text
        language = model.language
        flops = length * language_flops_per_token(language)
        flops += length**2 * attention_flops_per_token_squared(language)
        flops += 2 * language.hidden_size * language.vocab_size  # the head, of one row
        return flops + vit * TILES * vit_flops_per_tile(model.vision)

    return cost(0.0) / cost(compression)


def data_url(number: int, side_px: int) -> str:
    """A PNG of its own colour, so that no cache knows it; 3x3 tiles."""
    colour = (number % 256, number // 256 % 256, 99)
    content = io.BytesIO()
    Image.new("RGB", (3 * side_px, 3 * side_px), colour).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


class Endpoint:
    """An OpenAI-style server."""

    def __init__(self, base_url: str, *, api_key: str, side_px: int, threads: int) -> None:
        """Args: side_px: of a tile."""
        import openai

        self._client: Any = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        self._side_px, self._threads = side_px, threads

    def ask(self, model: str, number: int, words: int) -> Any:
        """One request; its usage."""
        text = f"{number:06d}" + " a" * words
        url = {"url": data_url(number, self._side_px), "max_dynamic_patch": 12}
        parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": text}]
        answer = self._client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": parts}],
            max_tokens=1,
            temperature=0,
        )
        return answer.usage

    def words_for(self, model: str, text_tokens: int) -> int:
        """Words that make a question of so many tokens more than none."""
        short, long = (self.ask(model, 0, words).prompt_tokens for words in (0, 100))
        return max(0, round((text_tokens - 6) * 100 / max(long - short, 1)))

    def measure(self, model: str, text_tokens: int, requests: int) -> tuple[float, float]:
        """Requests a second, and the mean of visual tokens a request (0 where it is not told)."""
        words = self.words_for(model, text_tokens)
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(lambda number: self.ask(model, number, words), range(self._threads)))
            start = time.perf_counter()
            numbers = range(self._threads, self._threads + requests)
            usages = list(pool.map(lambda number: self.ask(model, number, words), numbers))
            wall_s = time.perf_counter() - start
        told = [usage.model_extra.get("vico", {}) for usage in usages]
        if wrong := [each["tiles"] for each in told if each and each["tiles"] != TILES]:
            raise SystemExit(
                f"{model}: {wrong[0]} tiles a request, expected {TILES}: give --side-px of the"
                " model's tiles, and let the server use the thumbnail and 12 tiles."
            )
        visual = sum(each.get("visual_tokens", 0) for each in told) / requests
        return requests / wall_s, visual


def over_http(args: argparse.Namespace) -> list[Row]:
    """All cells, against the endpoint."""
    endpoint = Endpoint(
        args.base_url, api_key=args.api_key, side_px=args.side_px, threads=args.threads
    )
    models = args.models or [f"{args.model}@{plan}" for plan in PLANS]
    rows = []
    for text in TEXTS:
        whole = 0.0
        for compression, model in zip(COMPRESSION, models, strict=False):
            per_s, visual = endpoint.measure(model, text, args.requests)
            whole = whole or visual
            saved = 1 - visual / whole if whole else compression
            rows.append(Row(text_tokens=text, compression=compression, per_s=per_s, saved=saved))
            print(f"{model}, {text} text tokens: {per_s:.3f} a second", flush=True)
    return rows


def in_process(model: ModelConfig, args: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """All cells for the language model of one process, one request at a time, and the router's."""
    import torch

    from megatron_vico import cpu_stand_in
    from megatron_vico.config.schema import ParallelOptions, RunConfig, TrainingOptions
    from megatron_vico.models.build import (
        build_language_model,
        build_vision_encoder,
        language_transformer_config,
        vision_transformer_config,
    )
    from megatron_vico.parallel import groups as process_groups

    cpu_stand_in.install()
    bf16 = args.bf16
    with (
        process_groups.started(ParallelOptions(), seed=0, timeout_minutes=10) as groups,
        torch.inference_mode(),
    ):
        encoder = build_vision_encoder(
            model, vision_transformer_config(model, bf16=bf16), pg_collection=groups.encoder
        )
        config = language_transformer_config(model, RunConfig(training=TrainingOptions(bf16=bf16)))
        language_model = build_language_model(
            model, config, pg_collection=groups.language, attention="sdpa"
        )
        dtype = config.params_dtype
        encoder = encoder.to(groups.device, dtype).eval()
        language_model = language_model.to(groups.device, dtype).eval()

        return _time_parts(encoder, language_model, model, args.requests)


def _time_parts(
    encoder: Any, language_model: Any, model: ModelConfig, requests: int
) -> tuple[list[Row], dict[str, float]]:
    import torch

    parameter = next(encoder.parameters())
    device, dtype = parameter.device, parameter.dtype
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if not on_gpu:
        torch.set_num_threads(1)

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(1 + requests):  # the first warms up
            start = clock()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(clock() - start)
        return min(times[1:])

    side = model.vision.image_size
    pixels = torch.rand(TILES, 3, side, side, device=device, dtype=dtype)
    features = encoder.features(pixels)
    parts = {
        "vit_s": seconds(lambda: encoder.features(pixels)),
        "router_s": seconds(lambda: encoder.vir(features)),
    }
    rows = []
    for text in TEXTS:
        for compression in COMPRESSION:
            visual = round(TILES * model.visual_tokens_per_tile * (1 - compression))
            ids = torch.zeros(1, visual + text, dtype=torch.int64, device=device)
            positions = torch.arange(visual + text, device=device)[None]

            def prefill(ids: torch.Tensor = ids, positions: torch.Tensor = positions) -> None:
                cache = language_model.new_cache(1, ids.size(1))
                hidden = language_model.forward_batch(ids, positions, cache=cache)
                language_model.response_logits(hidden[:, -1])

            per_s = 1 / seconds(prefill)
            rows.append(
                Row(text_tokens=text, compression=compression, per_s=per_s, saved=compression)
            )
    return rows, parts


def table(rows: Sequence[Row], model: ModelConfig, *, paper: str | None) -> str:
    """Speed-ups beside the bounds, and the paper's."""
    head = ["text", "saved", "first tokens/s", "speed-up", "FLOP bound", "with ViT"]
    lines = [[*head, *([f"paper, {paper}"] if paper else [])]]
    for row in rows:
        whole = next(each for each in rows if each.text_tokens == row.text_tokens)
        bounds = [
            bound(model, text=row.text_tokens, compression=row.saved, vit=vit)
            for vit in (False, True)
        ]
        line = [f"{row.text_tokens}", f"{row.saved:.1%}", f"{row.per_s:.3f}"]
        line += [f"{value:.2f}" for value in (row.per_s / whole.per_s, *bounds)]
        if paper:
            line.append(f"{PAPER[paper, row.text_tokens][COMPRESSION.index(row.compression)]:.2f}")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def router_line(model: ModelConfig, parts: dict[str, float], rows: Sequence[Row]) -> str:
    """Appendix B: the router's parameters, and its time."""
    counts = model.parameter_counts()
    total = sum(asdict(counts).values())
    text = f"router: {counts.vir / 1e6:.1f} M of {total / 1e6:,.0f} M parameters"
    if parts:
        text += (
            f"; {parts['router_s']:.4f} s for {TILES} tiles, ViT {parts['vit_s']:.4f} s, language"
            f" model without compression {1 / rows[0].per_s:.4f} s"
        )
    return text


def main() -> None:
    """Measure, print, and write JSON where --json says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", help="of an OpenAI-style endpoint; unset, in this process")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", default="internvl", help="name before the @ of vico serve")
    parser.add_argument("--models", nargs="+", help="names for 0, 25, 50, 75 %%, or the first ones")
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2000, help="of each cell")
    parser.add_argument("--side-px", type=int, help="of a tile; unset, the model's")
    parser.add_argument(
        "--model-size", default="internvl3_5-8b", choices=sorted(MODELS), help="for the bounds"
    )
    parser.add_argument("--layers", type=int, help="of the language model, where it is cut")
    parser.add_argument("--bf16", action="store_true", help="in this process")
    parser.add_argument("--paper", choices=sorted({name for name, _ in PAPER}))
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    model = get_model_config(args.model_size)
    args.side_px = args.side_px or model.vision.image_size
    if args.layers is not None:
        language = dataclasses.replace(model.language, num_layers=args.layers)
        model = dataclasses.replace(model, language=language)
    rows, parts = (over_http(args), {}) if args.base_url else in_process(model, args)
    print(f"\n{table(rows, model, paper=args.paper)}\n{router_line(model, parts, rows)}")
    if args.json is not None:
        found = {"model": model.name, "rows": [asdict(row) for row in rows]} | parts
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
