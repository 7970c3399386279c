"""The build process: its end, and the options that it receives."""

import json
from pathlib import Path

import pytest

from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.tensorrt.build import _worker_error
from srdeploy.runtime.engines.tensorrt.rtx import RTX
from srdeploy.runtime.engines.tensorrt.worker import options_from_json, options_to_json


@pytest.mark.parametrize(
    ("status", "last", "code", "words"),
    [
        (5, {"error": ["cannot build", None, "do this"], "code": 5}, 5, "cannot build; do this"),
        (8, {"error": ["cannot write", None, None], "code": 8}, 8, "free some space"),
        (-9, {}, 5, "memory was full"),
        (-11, {}, 5, "crashed with signal 11"),
        (1, {}, 5, "status 1"),
    ],
    ids=["told", "disk", "killed", "crashed", "unexpected"],
)
def test_every_end_of_the_worker_is_an_error_of_ours(
    status: int, last: dict[str, object], code: int, words: str
) -> None:
    error = _worker_error(RTX, status, last, "Traceback: boom")

    assert error.exit_code == code
    assert words in str(error)


def test_options_survive_the_way_to_the_worker() -> None:
    shape = (1, 3, 8, 8)
    options = BuildOptions(
        profiles=(ShapeProfile(shape, shape, shape),),
        compute_capabilities=("8.9",),
        timing_cache=Path("t"),
        log_path=Path("l"),
        workspace_bytes=5,
    )

    assert options_from_json(json.loads(json.dumps(options_to_json(options)))) == options
