"""What must hold before transformers is imported. Import this first."""

import os
import sys
from pathlib import Path

# `python -m pytest` puts the repository's root on sys.path, where kernels/ would shadow the Hub's package of that name.
_ROOT = Path(__file__).parents[2]
BENCH = _ROOT / "bench"
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]

# For scripts of bench/ that a test runs, as `just` does.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BENCH / "shared"), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub
