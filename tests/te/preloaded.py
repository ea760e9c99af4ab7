"""TransformerEngine on a CPU for a whole process: pytest's plugin (`-p tests.te.preloaded`), for it
must come before tests/conftest.py, and what the ranks of a launch are forked from.

In fp32 too, where this project takes its own layers: a comparison in fp32 shows more.
"""

from tests.te import on_cpu

on_cpu.install()

import tests.distributed.preloaded  # noqa: E402, F401
from megatron_vico.models import build  # noqa: E402

build.takes_transformer_engine = lambda config, attention: attention == "auto"
