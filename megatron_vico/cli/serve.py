"""`vico serve`: answer OpenAI's chat completions, with one model name for each compression plan."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tyro.conf import UseAppendAction

from megatron_vico.cli.command_line import read, refuse_less
from megatron_vico.cli.engine_flags import PlanFlags
from megatron_vico.config.schema import flag_of
from megatron_vico.errors import ConfigError
from megatron_vico.files import refuse_incomplete, refuse_unwritable

if TYPE_CHECKING:
    from megatron_vico.inference.engine import Engine
    from megatron_vico.inference.server.app import Server


@dataclass(frozen=True, kw_only=True)
class Flags(PlanFlags):
    """Answer clients of OpenAI's protocol, such as VLMEvalKit and lmms-eval.

    A client chooses a plan by the model's name: internvl@none, internvl@random=0.55, and the most
    tiles of an image by what is added to it: internvl@vir+tiles=24.
    """

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all."""

    port: int = 8000
    """Port to listen at; 0: any, which is printed."""

    served_model_name: str = "internvl"
    """Name before the @."""

    plans: tuple[str, ...] = ()
    """Plans that /v1/models lists, the default first; unset, all that --load can do. Others, such
    as another share of random tiles, are answered too."""

    api_key: UseAppendAction[tuple[str, ...]] = ()
    """A key that clients must send; may be repeated; unset, anybody is answered."""

    max_model_len: int | None = None
    """Tokens of a conversation, its answer included; unset, those of the model. The cache has room
    for --batch-size of the longest that came."""

    max_concurrency: int = 256
    """Requests at a time, waiting ones included; more are told to come again (429)."""

    max_body_mib: int = 256
    """Largest body of a request."""

    max_pending_mib: int = 8192
    """Bodies and tiles of all requests that are not answered yet."""

    body_timeout: float = 60.0
    """Seconds in which a body must come."""

    request_timeout: float = 600.0
    """Seconds in which an answer must be there."""

    tiles_by_detail: bool = False
    """Take OpenAI's `detail` low, medium, high as 6, 12, 24 tiles, as LMDeploy does."""

    tiles_per_request: int | None = None
    """Tiles that the images of a request share, such as 64; unset, each has its own limit."""

    request_log: Path | None = None
    """JSONL file that gets a line a request; `vico table` and `--replay` read it."""

    _counts: ClassVar[tuple[str, ...]] = (
        *PlanFlags._counts,
        "max_concurrency",
        "max_body_mib",
        "max_pending_mib",
        "max_model_len",
        "tiles_per_request",
    )

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a number, a name or a file cannot be used."""
        super().__post_init__()
        refuse_less(self, port=0, body_timeout=0.001, request_timeout=0.001)
        if self.port > 65535:
            raise ConfigError(f"--port {self.port}: expected 0 to 65535.")
        for name in ("host", "served_model_name"):
            if not getattr(self, name):
                raise ConfigError(f"{flag_of(name)} '': expected a name.")
        if "" in self.api_key:
            raise ConfigError("--api-key '': expected a key; leave it out to answer anybody.")
        refuse_unwritable("--request-log", self.request_log)


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT; what is being answered then is answered.

    Raises:
        ConfigError: if a flag, or a plan, cannot be followed.
        CheckpointError: if --load is no checkpoint.
    """
    options = read(Flags, arguments, prog="vico serve")
    refuse_incomplete(options.load)
    from megatron_vico import cpu_stand_in

    cpu_stand_in.install()
    try:
        import uvicorn

        from megatron_vico.inference.sampling import Chooser, Sampling
        from megatron_vico.inference.server.engine_thread import EngineThread
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs {error.name}: pip install 'megatron_vico[serve]'."
        ) from error

    with options.engine() as engine:
        if options.max_model_len is not None:
            engine.max_len = min(engine.max_len, options.max_model_len)
        # uvicorn hands the signal on once all is answered; a launcher sends it to every rank.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        if not engine.is_main:
            EngineThread(engine).follow()
            return
        server = make_server(options, engine)
        Chooser(Sampling(temperature=1.0, top_p=0.9))  # imports for seconds; now nobody waits
        config = uvicorn.Config(
            server.app, host=options.host, port=options.port, log_level="info", access_log=False
        )
        print(f"serving {', '.join(server.models.names)}", flush=True)
        uvicorn.Server(config).run()


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[str]:
    """Serve in a thread of this process, on a free port; the address for clients."""
    options = read(Flags, arguments, prog="vico serve")
    refuse_incomplete(options.load)
    from megatron_vico import cpu_stand_in

    cpu_stand_in.install()
    import uvicorn

    with options.engine() as engine:
        app = make_server(options, engine).app
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, name="server", daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.should_exit = True
            thread.join()


def make_server(options: Flags, engine: "Engine") -> "Server":
    """The application of these flags; ConfigError if a plan cannot be served."""
    from megatron_vico.inference.loading import fingerprint
    from megatron_vico.inference.server.app import Server, ServerOptions
    from megatron_vico.inference.server.chat import TileLimits
    from megatron_vico.inference.server.models import Models

    usual = ["none", "all", "random=0.55"]
    if "connector_16x" in options.drawn:
        usual = ["none"]
    elif "vir" not in options.drawn:
        usual = ["vir", "image", *usual]
    usual += [] if options.replay is None else ["replay"]
    usual += ["fastv", "sparsevlm"] if options.model.language.num_layers > 2 else []
    plans = [name for words in options.plans for name in words.split(",")]
    models = Models(options.served_model_name, plans or usual, read_plan=options.read_plan)
    limits = TileLimits(
        default=options.use.max_dynamic_patch,
        by_detail=options.tiles_by_detail,
        per_request=options.tiles_per_request,
    )
    limits_and_log = ServerOptions(
        tiles=limits,
        api_keys=options.api_key,
        max_concurrency=options.max_concurrency,
        max_body_bytes=options.max_body_mib << 20,
        max_pending_bytes=options.max_pending_mib << 20,
        body_timeout_s=options.body_timeout,
        request_timeout_s=options.request_timeout,
        request_log=options.request_log,
        fingerprint=fingerprint(engine),
    )
    return Server(engine, models, limits_and_log)
