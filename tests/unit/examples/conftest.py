"""The demo's files are scripts, not a package: put their folder on the import path."""

import sys
from pathlib import Path

QUICKSTART = Path(__file__).resolve().parents[3] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
