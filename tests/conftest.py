"""Shared fixtures. Tests make their own small networks and images; reference data is optional."""

import os
import signal
from pathlib import Path

import pytest

# Shells start background jobs with Ctrl-C ignored, and children inherit that; the tests about Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Folder of reference data that may not be redistributed (Set5, photographs, public-format checkpoints).

    It is named by the environment variable SRDEPLOY_REFERENCE_DATA; without it these tests are skipped.
    """
    folder = os.environ.get("SRDEPLOY_REFERENCE_DATA")
    if not folder:
        pytest.skip("SRDEPLOY_REFERENCE_DATA names no folder of reference data (Set5 and photographs)")
    return Path(folder)
