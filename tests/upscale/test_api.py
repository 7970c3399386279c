"""The Python API: one import, nothing heavy until it is used."""

import subprocess
import sys

import srdeploy.upscale


def test_public_names_are_importable() -> None:
    for name in srdeploy.upscale.__all__:
        assert getattr(srdeploy.upscale, name).__name__ == name


def test_package_imports_nothing_heavy() -> None:
    code = (
        "import sys; from srdeploy import upscale; "
        "sys.exit(', '.join({'torch', 'onnx', 'onnxruntime', 'numpy', 'PIL', 'av'} & set(sys.modules)) or 0)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
