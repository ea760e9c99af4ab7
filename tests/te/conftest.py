"""Tests that need TransformerEngine's Python beside this project: `make test-te`."""

import importlib.util

# In the environment of `make test` it must not be: a package that cannot load its library takes
# megatron-core down with it.
collect_ignore_glob = [] if importlib.util.find_spec("transformer_engine") else ["test_*.py"]
