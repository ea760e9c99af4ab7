"""What every rank of a test needs, imported once by the process that all ranks are forked from.

The stand-in comes first: megatron-core decides some things while it is imported.
"""

from megatron_vico import cpu_stand_in

cpu_stand_in.install()

import pytest  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
import transformers.generation  # noqa: E402, F401

import megatron_vico.convert.convert  # noqa: E402
import megatron_vico.training.trainer  # noqa: E402, F401
