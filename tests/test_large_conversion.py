"""A checkpoint of gigabytes converts both ways in bounded memory; `make test-large` does it with
eight of them."""

import os
from pathlib import Path

import pytest

from tests.large_conversion import ALLOWED_BYTES, SHARD_BYTES, measure

NUM_GB = float(os.environ.get("VICO_TEST_GB", "1"))
"""Small unless asked for otherwise, to be made, copied, converted and compared within a minute."""


@pytest.mark.slow
def test_memory_and_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(tmp_path, NUM_GB, num_attempts=2 if NUM_GB >= 8 else 1)
    with capsys.disabled():
        print("", *found, sep="\n")
    for each in found:
        assert each.peak_bytes < SHARD_BYTES + ALLOWED_BYTES
        if NUM_GB >= 8:
            assert each.share_of_copy_speed > 0.5
        else:
            # The bound above is more than all of it: what is held must be a few tensors, and the
            # programs (0.6 GB). Measured: 0.78 GB; with the whole checkpoint, 1.6 GB.
            assert each.peak_bytes < 1_100_000_000
