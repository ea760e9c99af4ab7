"""A model of lmms-eval 0.7.3 (`--model vico`) that asks `vico serve`, any such endpoint, or itself.

Its stock `openai` model asks the same; this one also sends each sample's TASK/SPLIT/DOC_ID as the
request's id, by which `vico table` finds it in the server's log, passes a limit of tiles a task,
and stops the run when an answer cannot be had, where the stock one scores an error's text.
With `load=` it serves a checkpoint in its own process, and asks that: nothing else to start.
lmms-eval finds it by the entry point `lmms_eval.models`; it has its own environment (make
test-eval), so that without `load=` nothing of ours but this file is imported there.
"""

import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import openai
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

MANIFEST = ModelManifest(model_id="vico", chat_class_path="megatron_vico.lmms_plugin.ViCOModel")

# Tiles that InternVL's own evaluation gives an image of a task; others get the server's default.
MAX_TILES = {"chartqa": 12, "mmmu_val": 12, "docvqa_val": 18, "infovqa_val": 24, "ocrbench": 24}


class ViCOModel(lmms):
    """Asks for each sample over HTTP, `num_concurrent` at a time."""

    is_simple = False

    def __init__(
        self,
        *,
        model: str,
        base_url: str = "http://127.0.0.1:8000/v1",
        api_key: str = "none",
        num_concurrent: int = 32,
        timeout: float = 600.0,
        max_frames: int = 64,
        max_tiles: str = "task",
        load: str | None = None,
        **unused: Any,  # batch_size, device: of other models
    ) -> None:
        """Without `load` at `base_url`; with it, a checkpoint is served here.

        Args:
            model: with its plan, internvl@vir.
            max_tiles: a number, or "task": MAX_TILES.
            load: a checkpoint's folder, behind it flags of `vico serve`: "/models/8b-flash --bf16".
        """
        super().__init__()
        self._served = ExitStack()
        if load is not None:
            from megatron_vico.cli.serve import serving

            words = ["--load", *shlex.split(load), "--served-model-name", model.partition("@")[0]]
            base_url = self._served.enter_context(serving(words))
        self.model = model
        self.num_concurrent = int(num_concurrent)
        self.max_frames = int(max_frames)
        self.max_tiles = max_tiles
        # The client's own retries go on the server's Retry-After.
        self.client: Any = openai.OpenAI(
            base_url=base_url, api_key=api_key, timeout=float(timeout), max_retries=8
        )

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of `requests`; the first that cannot be had ends the run."""
        with ThreadPoolExecutor(self.num_concurrent) as pool:
            answers = pool.map(self._ask, [request.args for request in requests])
            return list(tqdm(answers, total=len(requests), desc=self.model))

    def _ask(self, args: tuple[Any, ...]) -> GenerationResult:
        _, to_messages, given, doc_id, task, split = args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        limit = MAX_TILES.get(task) if self.max_tiles == "task" else int(self.max_tiles)
        answer = self.client.chat.completions.create(
            model=self.model,
            messages=messages.to_openai_messages(video_kwargs={"nframes": self.max_frames}),
            max_tokens=given.get("max_new_tokens", 1024),
            temperature=given.get("temperature", 0) if given.get("do_sample", True) else 0,
            top_p=given.get("top_p") or 1,
            extra_headers={"X-Request-Id": f"{task}/{split}/{doc_id}"},
            extra_body={"mm_processor_kwargs": {"max_dynamic_patch": limit}} if limit else {},
        )
        usage = answer.usage
        counts = TokenCounts(
            input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens
        )
        return GenerationResult(text=answer.choices[0].message.content or "", token_counts=counts)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of no task of the paper."""
        raise NotImplementedError("the server gives no log-probabilities")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Of no task of the paper."""
        raise NotImplementedError("no task of the paper has several rounds")
