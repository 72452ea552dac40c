"""The real data that may lie beside the checkout, and the mark of tests that need it."""

from pathlib import Path

import pytest

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no shared/data beside the checkout")
