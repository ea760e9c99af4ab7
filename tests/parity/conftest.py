"""For each file of parity tests a folder of remote code, and exports that carry it."""

import sys
from collections.abc import Iterator

import pytest
from transformers import dynamic_module_utils

from tests.parity.remote_exports import exported  # noqa: F401


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies remote code to a folder on sys.path, by default in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", list(sys.path))
        yield
    # Else the next file's imports would look for its modules in this one's folder.
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
