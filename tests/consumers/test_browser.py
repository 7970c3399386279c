"""The graphs in a browser: onnxruntime-web in headless Chromium, through the page of examples/web."""

import re
import runpy
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import chromium
from consumers.conftest import ROOT
from numpy.typing import NDArray
from PIL import Image

from srdeploy.cli.main import run
from srdeploy.core.imaging.psnr import psnr_db
from srdeploy.core.precision import Precision
from srdeploy.export.web import WEBGPU_OPERATORS, web_notes
from srdeploy.upscale.upscaler import Upscaler

WEB = ROOT / "examples" / "web"
PACKAGE = WEB / "node_modules" / "onnxruntime-web"
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan",
                "--use-vulkan=swiftshader")  # fmt: skip
"""WebGPU on SwiftShader, a GPU in software."""

COMPUTE = """
async ({graph, width, height, rgba, backend}) => {
  const { openNetwork, upscale } = await import("/network.mjs");
  const bytes = new Uint8Array(await (await fetch(graph)).arrayBuffer());
  const network = await openNetwork(bytes, backend);
  const result = await upscale(network.session, new ImageData(new Uint8ClampedArray(rgba), width, height));
  return { backend: network.backend, notes: network.notes, width: result.width, height: result.height,
           values: Array.from(result.values) };
}
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if not PACKAGE.exists():
        pytest.skip(f"{PACKAGE} does not exist; make test-consumers makes it")
    server = runpy.run_path(str(WEB / "serve.py"))["server"](0)
    server.RequestHandlerClass.func.log_message = lambda *_: None  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium(*SOFTWARE_GPU) as opened:
        yield opened


def answer(path: Path, route: Any) -> None:
    route.fulfill(path=path)


@pytest.fixture
def page(browser: Any, address: str, graphs: dict[str, Path]) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    opened = context.new_page()
    for name, path in graphs.items():
        opened.route(f"**/{name}.onnx", partial(answer, path))
    opened.set_default_timeout(60_000)
    opened.goto(address)
    yield opened
    context.close()


def computed(page: Any, graph: str, levels: NDArray[np.uint8], backend: str) -> tuple[NDArray[np.float32], Any]:
    height, width, _ = levels.shape
    rgba = np.dstack([levels, np.full((height, width), 255, np.uint8)])
    arguments = {"graph": f"/{graph}.onnx", "width": width, "height": height, "backend": backend}
    result = page.evaluate(COMPUTE, {**arguments, "rgba": rgba.ravel().tolist()})
    values = np.array(result["values"], np.float32).reshape(3, result["height"], result["width"])
    return values.transpose(1, 2, 0), result


@pytest.mark.parametrize(
    ("graph", "backend", "used", "note", "minimum_db"),
    [
        ("fp32", "wasm", "wasm", None, 120.0),
        ("fp16", "wasm", "wasm", None, 90.0),
        ("int8", "wasm", "wasm", None, 45.0),
        ("fp32", "webgpu", "webgpu", "swiftshader is no GPU", 110.0),
        ("fp16", "auto", "wasm", "requires f16 but the device does not support it", 90.0),
        ("int8", "auto", "wasm", "it has no kernel for some operators of this graph", 45.0),
    ],
    ids=["FP32", "FP16", "INT8", "WebGPU", "FP16 without shader-f16", "INT8 without kernels"],
)
def test_values_are_those_of_the_upscaler_and_a_fallback_is_said(
    page: Any,
    graphs: dict[str, Path],
    picture: NDArray[np.float32],
    capsys: pytest.CaptureFixture[str],
    graph: str,
    backend: str,
    used: str,
    note: str | None,
    minimum_db: float,
) -> None:
    levels = (picture[:24, :32] * 255).round().astype(np.uint8)
    with Upscaler.open(graphs[graph], engine="onnxruntime", threads=1) as up:
        expected = up(levels.astype(np.float32) / 255)
    if "webgpu" in (backend, used) and page.evaluate("navigator.gpu?.requestAdapter().then((a) => !a)") is not False:
        pytest.skip("WebGPU does not start on SwiftShader here")

    values, result = computed(page, graph, levels, backend)

    found = psnr_db(values, expected)
    with capsys.disabled():
        print(f"\n{graph} on {result['backend']}: {found:.1f} dB to Upscaler; {' '.join(result['notes'])}")
    assert result["backend"] == used
    assert (note or "") in " ".join(result["notes"])
    assert bool(result["notes"]) == (note is not None)
    assert found > minimum_db


def test_without_webgpu_that_is_said(page: Any, picture: NDArray[np.float32]) -> None:
    page.evaluate("Object.defineProperty(Navigator.prototype, 'gpu', { get: () => undefined })")

    _, result = computed(page, "fp32", (picture[:8, :8] * 255).astype(np.uint8), "auto")

    assert result["backend"] == "wasm"
    assert result["notes"][0].startswith("WebGPU is not used: this browser or page has no WebGPU")


def finished(page: Any, network: Path, picture: Path) -> str:
    page.select_option("#backend", "wasm")
    page.set_input_files("#network", network)
    page.set_input_files("#picture", picture)
    page.wait_for_function("/^(Done|Failed)/.test(document.getElementById('status').textContent)")
    text: str = page.text_content("#status")
    return text


def test_the_page_shows_both_pictures_with_a_slider(
    page: Any, graphs: dict[str, Path], picture: NDArray[np.float32], tmp_path: Path
) -> None:
    levels = (picture * 255).round().astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "photo.png")
    with Upscaler.open(graphs["fp32"], engine="onnxruntime", threads=1) as up:
        expected = up(levels)

    assert re.match(r"Done in \d", finished(page, graphs["fp32"], tmp_path / "photo.png"))

    assert page.text_content("#caption") == "56 x 40 to 112 x 80"
    shown = page.evaluate("Array.from(after.getContext('2d').getImageData(0, 0, 112, 80).data)")
    difference = np.array(shown).reshape(80, 112, 4)[..., :3].astype(int) - expected
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 1e-3, "a value on the border of two levels may fall to the other"
    page.locator("#slider").fill("20")
    assert page.evaluate("getComputedStyle(before).clipPath") == "inset(0px 80% 0px 0px)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1000
    page.wait_for_function("save.href.startsWith('blob:')")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("y.onnx", "the graph takes 1 channel, not RGB; make it with: srdeploy export ... --color-wrapper"),
        ("noise.onnx", "Failed: "),
        ("noise.png", "noise.png is not a picture that this browser reads"),
    ],
    ids=["one channel", "no graph", "no picture"],
)
def test_what_does_not_fit_is_one_sentence(
    page: Any, graphs: dict[str, Path], tmp_path: Path, network: str, message: str
) -> None:
    for name in ("noise.onnx", "noise.png"):
        (tmp_path / name).write_bytes(b"neither graph nor picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    graph = graphs["y"] if network == "y.onnx" else tmp_path / network
    photo = tmp_path / "photo.png"
    if network == "noise.png":
        graph, photo = graphs["fp32"], tmp_path / network

    text = finished(page, graph, photo)

    assert message in text
    assert text.startswith("Failed: ")
    assert not page.locator("#result").is_visible()


def test_the_list_of_operators_is_the_packages() -> None:
    if not PACKAGE.exists():
        pytest.skip(f"{PACKAGE} does not exist; make test-consumers makes it")
    table = (PACKAGE / "docs" / "webgpu-operators.md").read_text()
    kernels = {
        name
        for name, versions, comment in re.findall(r"^\| (\w+) \| (.*?) \| (.*?) \|$", table, re.MULTILINE)
        if (newest := re.search(r"(\d+)\+", versions)) and int(newest[1]) <= 21 and "no GPU kernel" not in comment
    }

    assert kernels >= WEBGPU_OPERATORS
    assert not kernels & {"PRelu", "QuantizeLinear", "Round"}, "notes name these"


def test_export_for_the_web_wraps_and_lists(
    graphs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(graphs["y"]), "--target", "web", "-o", str(tmp_path / "rgb.onnx")]) == 0
    assert "RGB around a network of one channel" in capsys.readouterr().err
    assert run(["export", str(graphs["int8"]), "--target", "web", "-o", str(tmp_path / "int8.onnx")]) == 0
    assert "note: WebGPU has no kernel for" in capsys.readouterr().err
    assert run(["export", str(graphs["int8"]), "--target", "web", "-o", str(tmp_path / "int8.onnx")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_a_browser_should_know_is_noted() -> None:
    assert web_notes(["Conv", "Relu"], Precision.FP32, 10**6, one_file=True) == []
    (half,) = web_notes(["Conv"], Precision.FP16, 10**6, one_file=True)
    assert "shader-f16" in half
    assert len(web_notes(["PRelu"], Precision.FP32, 2 * 10**8, one_file=False)) == 3
