"""Public names of packages: importing the package imports no PyTorch, using a name does."""

import subprocess
import sys
from importlib import import_module

import pytest

PACKAGES = ["srdeploy.models.networks", "srdeploy.models.checkpoint"]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_there_and_no_other(name: str) -> None:
    package = import_module(name)

    assert package.__all__
    assert all(getattr(package, public).__name__ for public in package.__all__ if public != "NetworkConfig")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(package, "nothing")  # noqa: B009


def test_importing_the_packages_and_the_choices_imports_no_pytorch() -> None:
    code = "import sys\n" + "".join(f"import {name}\n" for name in [*PACKAGES, "srdeploy.models.choices"])

    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
