"""Runners of srdeploy as runners of NVIDIA's Polygraphy, for its `Comparator` and everything built on it.

ours = polygraphy_runner(lambda: open_engine(path), "ours")
results = Comparator.run([ours, other_runner], data_loader=[{"input": image}])
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from srdeploy.core.contract import INPUT
from srdeploy.core.extras import import_extra
from srdeploy.core.runner import Runner


def polygraphy_runner(open_runner: Callable[[], Runner], name: str) -> Any:
    """Return a `polygraphy.backend.base.BaseRunner` that computes with a runner of srdeploy.

    Args:
        open_runner: opens the runner. Polygraphy activates and deactivates runners, more than once if it likes: each
            time the runner is opened and closed.
        name: of the runner in Polygraphy's results.

    Raises:
        MissingExtraError: Polygraphy is not installed.
    """
    base: Any = import_extra("polygraphy.backend.base", "gpu")
    common: Any = import_extra("polygraphy.common", "gpu")

    class PolygraphyRunner(base.BaseRunner):  # type: ignore[misc]  # known at run time only
        """One runner of srdeploy; see `polygraphy_runner`."""

        def __init__(self) -> None:
            super().__init__(name=name)
            self._runner: Runner | None = None

        def activate_impl(self) -> None:
            self._runner = open_runner().__enter__()

        def get_input_metadata_impl(self) -> Any:
            assert self._runner is not None
            channels = self._runner.info.contract.channels
            return common.TensorMetadata().add(INPUT, dtype=np.float32, shape=(None, channels, None, None))

        def infer_impl(self, feed_dict: dict[str, Any]) -> "OrderedDict[str, Any]":
            assert self._runner is not None
            feeds = {key: np.asarray(value) for key, value in feed_dict.items()}
            started = time.perf_counter()
            results = OrderedDict(self._runner.run(feeds))
            self.inference_time = time.perf_counter() - started  # seconds, copies included, as in Polygraphy's runners
            return results

        def deactivate_impl(self) -> None:
            runner, self._runner = self._runner, None
            if runner is not None:
                runner.__exit__(None, None, None)

    return PolygraphyRunner()
