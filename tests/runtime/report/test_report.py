"""The report: its document by the schema, its page in a real browser, and two reports against each other."""

import copy
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import chromium
from numpy.typing import NDArray

from srdeploy.core.contract import OUTPUT, ModelContract
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo
from srdeploy.core.samples import Sample
from srdeploy.core.sizes import format_bytes
from srdeploy.runtime.bench.latency import BenchResult, Row
from srdeploy.runtime.bench.memory import Memory
from srdeploy.runtime.bench.turns import Effort, statistics_of, why_unstable
from srdeploy.runtime.report import plots
from srdeploy.runtime.report.compare import Tolerances, compare
from srdeploy.runtime.report.crop_images import CropImages, heat_map, heat_peak
from srdeploy.runtime.report.document import EngineEntry, jsonable, report_document
from srdeploy.runtime.report.figure import label_points, new_figure, series_color, svg_of, tick_label
from srdeploy.runtime.report.labels import (
    change_label,
    db_label,
    difference_label,
    median_label,
    ratio_label,
    size_label,
)
from srdeploy.runtime.report.write import read_report, schema, write_report
from srdeploy.runtime.verify.parity import Gates, VerifyResult, verify_all

SCREENSHOTS = Path(__file__).parents[3] / "test-output"


def contract(precision: Precision = Precision.FP32) -> ModelContract:
    configuration = {"scale": 2, "groups": 1}
    return ModelContract("rcan", configuration, 2, "rgb", precision, None, 3e5, 64, "ab" * 32, provenance={"opset": 20})


class Enlarger:
    """Repeats pixels, and adds noise of a stated size: an engine with a known fidelity."""

    def __init__(
        self, name: str, precision: Precision = Precision.FP32, noise: float = 0.0, broken: bool = False
    ) -> None:
        self.noise, self.broken = noise, broken
        self.info = RunnerInfo(name, name.split()[0], "cpu", contract(precision), "FP32, hint f32", threads=1)

    def run(self, feeds: Any) -> dict[str, NDArray[np.float32]]:
        output = np.repeat(np.repeat(feeds["input"], 2, 2), 2, 3)
        output = output + np.random.default_rng(0).normal(0, self.noise, output.shape).astype(np.float32)
        if self.broken and output.shape[2] > 40:
            output[:, :, 10:20, 10:20] = np.nan
        return {OUTPUT: output}

    def __enter__(self) -> "Enlarger":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def judged(engine: Enlarger, gates: Gates | None = None) -> VerifyResult:
    y, x = np.mgrid[0:60, 0:80] / 9.0
    samples = []
    for index, name in enumerate(("meadow", "street <b>")):
        picture = np.stack([0.5 + 0.4 * np.sin(x + c + index) * np.cos(y - c) for c in range(3)])[None].astype(
            np.float32
        )
        truth = np.repeat(np.repeat(picture[0].transpose(1, 2, 0), 2, 0), 2, 1) * 254
        samples.append(Sample(name, picture, np.rint(truth).astype(np.uint8)))
    return verify_all([engine], Enlarger("eager fp32"), samples, gates=[gates], keep_crops=2)[0]


def spread(name: str, times: NDArray[np.float64]) -> Row:
    """A row of stated durations, with its own verdict on the median."""
    found = row(name, 1.0)
    statistics = statistics_of(list(times))
    reason = why_unstable(statistics, Effort())
    return replace(found, statistics=statistics, times_ms=tuple(times), stable=reason is None, why_unstable=reason)


def row(name: str, median: float, *, stable: bool = True) -> Row:
    times = tuple(float(value) for value in median * np.random.default_rng(1).uniform(0.97, 1.05, 30))
    info = RunnerInfo(name, name.split()[0], "cpu", contract(), "FP32", threads=1)
    return Row(info, "end-to-end", statistics_of(times), stable, None if stable else "too noisy", times)


def searched(share: float, latency: float | None, drop: float, taken: bool = False) -> dict[str, Any]:
    kept = [] if share == 1.0 else ["body.end"]
    return {"int8_macs_share": share, "latency_ms": latency, "fidelity_db": 55.0, "drop_db": drop,
            "layers_kept_float": kept, "layers_split": ["merged_tail"] if taken else [], "taken": taken}  # fmt: skip


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """A report with everything in it: passed, failed on NaN, excluded, not run, studies, sensitivity."""
    plain = EngineEntry("openvino fp32", "openvino", Precision.FP32, "a.blob", 1_300_000, "0" * 64, "30 fp32",
                        judged(Enlarger("openvino fp32", noise=1e-6)))  # fmt: skip
    int8 = EngineEntry("openvino int8", "openvino", Precision.INT8, "b.blob", 400_000, "1" * 64, "29 int8, 1 fp32",
                       judged(Enlarger("openvino int8", Precision.INT8, 2e-3)))  # fmt: skip
    broken = judged(Enlarger("onnxruntime int8", Precision.INT8, 0.01, broken=True))
    left = EngineEntry("onnxruntime int8", "onnxruntime", Precision.INT8, verify=broken, excluded=True)
    absent = EngineEntry(
        "tensorrt-rtx fp16", "tensorrt-rtx", Precision.FP16, "c.plan", 900_000, reason="no NVIDIA GPU here"
    )
    memory = {"openvino int8": Memory(7_000_000, "peak", 3_000_000_000, "fall of the GPU's free memory")}
    rows = (row("eager fp32", 90.0), row("openvino fp32", 30.0), row("openvino int8", 11.0),
            row("onnxruntime int8", 50.0, stable=False))  # fmt: skip
    return report_document(
        title="rcan_x2.srd",
        contract=contract(),
        engines=[plain, int8, left, absent],
        bench=BenchResult((1, 3, 60, 80), Effort(), rows, memory, {"processor": "a processor"}),
        checkpoint={"name": "rcan_x2.pt", "dialect": "official"},
        calibration={
            "images": 64, "ranges": {"method": "minmax"}, "notes": [f"{i}.png" for i in range(20)],
            "files": [{"name": "a <i>.png", "sha256": "c" * 64, "use": "calibration"}],
            "coverage": {"black": 1.0, "green": 0.055},
        },
        sensitivity=[{"layer": f"groups.0.blocks.{i}.conv1", "drop_db": 0.1 / (i + 1), "kept": None} for i in range(5)],
        searches=[{"graph": "model.int8.onnx", "bound_db": 0.02, "points": [
            searched(1.0, 11.0, 0.05), searched(0.9, 12.0, 0.01), searched(0.96, 11.5, 0.018, taken=True)]}],
        studies={
            "throughput": {"note": "one at a time", "runners": [{"name": "openvino int8", "points": [
                {"batch": 1, "images_per_second": 90.0}, {"batch": 4, "images_per_second": 120.0}]}]},
            "streams": {"note": "runs at once", "runners": [{"name": "b.blob", "points": [
                {"streams": 1, "images_per_second": 90.0}, {"streams": 2, "images_per_second": 100.0}]}]},
            "scaling": {"note": "batch 1", "floor": [{"pixels": 1024, "ms": 1.0}, {"pixels": 65536, "ms": 64.0}],
                        "memory_floor": [{"pixels": 1024, "ms": 0.2}, {"pixels": 65536, "ms": 12.8}],
                        "runners": [{"name": "openvino fp32", "points": [
                            {"side": 32, "pixels": 1024, "median_ms": 2.0, "stable": False},
                            {"side": 256, "pixels": 65536, "median_ms": 99.0}]}]},
        },
        stages=[{"name": "export", "seconds": 12.5, "note": "opset 20"}],
        commands=["srdeploy export rcan_x2.pt -o model.onnx"],
    )  # fmt: skip


def test_the_document_says_what_was_found(document: dict[str, Any]) -> None:
    lines = {line["name"]: line for line in document["engines"]}

    assert document["verdict"]["status"] == "partial"
    assert document["verdict"]["best"] == "openvino int8"
    assert document["verdict"]["headline"].startswith(
        "2 of 4 engines passed, 1 excluded, 1 not run here. openvino int8 is the fastest ("
    )
    assert document["verdict"]["equally_fast"] == []
    assert lines["openvino fp32"]["status"] == "passed"
    assert lines["openvino fp32"]["latency"]["end-to-end"]["ratio"] == pytest.approx(3.0, rel=0.05)
    assert lines["onnxruntime int8"]["fidelity_min_db"] == "nan"
    assert lines["onnxruntime int8"]["latency"]["end-to-end"]["stable"] is False
    assert lines["tensorrt-rtx fp16"]["status"] == "not-run"
    assert any("NaN" in reason for reason in document["verdict"]["reasons"])
    json.dumps(document, allow_nan=False)


def test_a_delivered_engine_that_failed_fails_the_report() -> None:
    bad = EngineEntry("x fp32", "x", Precision.FP32, verify=judged(Enlarger("x fp32", noise=0.1)))

    assert report_document(title="t", contract=contract(), engines=[bad])["verdict"]["status"] == "failed"


def test_nothing_run_is_no_pass() -> None:
    absent = EngineEntry("x fp16", "x", Precision.FP16, reason="no GPU")

    verdict = report_document(title="t", contract=contract(), engines=[absent])["verdict"]

    assert (verdict["status"], verdict["best"]) == ("not-verified", None)


def test_what_was_only_measured_is_not_called_not_run() -> None:
    entry = EngineEntry("openvino fp32", "openvino", Precision.FP32, reason="measured only", measured=True)
    bench = BenchResult((1, 3, 60, 80), Effort(), (row("eager fp32", 90.0), row("openvino fp32", 30.0)))

    document = report_document(title="t", contract=contract(), engines=[entry], bench=bench)

    assert document["engines"][0]["status"] == "measured"
    assert document["verdict"]["status"] == "not-verified"
    assert document["verdict"]["headline"].startswith(
        "0 of 1 engines passed, 1 measured, not verified. openvino fp32 is the fastest ("
    )
    assert document["verdict"]["best"] is None


def verified(bench: BenchResult, names: Sequence[str]) -> dict[str, Any]:
    entries = [EngineEntry(name, name.split()[0], Precision.FP32, verify=judged(Enlarger(name))) for name in names]
    return report_document(title="t", contract=contract(), engines=entries, bench=bench)


def test_engines_that_cannot_be_told_apart_are_named_together() -> None:
    names = ("openvino fp32", "onnxruntime fp32")
    noise = np.random.default_rng(3).uniform(0.8, 1.25, (2, 30))
    rows = (
        row("eager fp32", 90.0),
        *(spread(name, 30.0 * factors) for name, factors in zip(names, noise, strict=True)),
    )

    verdict = verified(BenchResult((1, 3, 60, 80), Effort(), rows), names)["verdict"]

    assert {verdict["best"], *verdict["equally_fast"]} == set(names)
    assert "are equally fast here (" in verdict["headline"]


def test_a_busy_machine_still_has_a_fastest_engine_and_every_point_with_its_bar() -> None:
    names = ("openvino fp32", "onnxruntime fp32")
    busy = np.exp(np.random.default_rng(4).standard_normal(30) * 0.5)  # slows all runners of a round alike
    rows = (spread("eager fp32", 90.0 * busy), spread(names[0], 30.0 * busy), spread(names[1], 45.0 * busy))

    document = verified(BenchResult((1, 3, 60, 80), Effort(), rows), names)

    assert not any(line["latency"]["end-to-end"]["stable"] for line in document["engines"])
    assert document["verdict"]["best"] == "openvino fp32"
    assert "(3.00x the speed of eager fp32, 3.00 to 3.00, fidelity" in document["verdict"]["headline"]
    drawing = plots.fidelity_over_speed(document)
    assert drawing is not None
    assert all(f'<g id="engine-{index}-fidelity"><title>{name}: ' in drawing for index, name in enumerate(names))


def test_the_page_shows_memory_floors_coverage_and_records(document: dict[str, Any], tmp_path: Path) -> None:
    html = write_report(document, tmp_path / "report").read_text()

    assert f"GPU {format_bytes(3e9)}" in html
    assert "GPU memory is the fall of the GPU&#39;s free memory." in html
    assert "floor: memory traffic" in html
    assert "floor: multiply-adds" in html
    assert "Throughput over runs at once" in html
    assert 'value="0.055" aria-label="green"' in html
    assert "<td>a &lt;i&gt;.png</td><td>cccccccccccc…</td>" in html
    assert "{&#39;" not in html, "a Python dictionary is no wording"


def test_a_report_of_before_gpu_memory_is_still_read(document: dict[str, Any], tmp_path: Path) -> None:
    older = copy.deepcopy(document)
    for line in older["engines"] + older["bench"][0]["rows"]:
        for key in ("memory_note", "device_memory_bytes", "device_memory_note"):
            del line[key]

    assert write_report(older, tmp_path / "report").is_file()
    assert compare(older, document).regressions == ()


def test_writing_and_reading_back(document: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(document, tmp_path / "report")

    folder = page.parent
    stored = read_report(folder)
    assert {entry.name for entry in folder.iterdir()} == {"report.json", "report.html", "crops"}
    assert len(list((folder / "crops").iterdir())) == len(stored["pictures"])
    assert all("data" not in entry for entry in stored["pictures"].values())
    assert stored["engines"] == document["engines"]
    again = write_report(read_report(folder, with_pictures=True), tmp_path / "again")
    assert again.read_bytes() == page.read_bytes()


def test_an_existing_report_stays_without_force(document: dict[str, Any], tmp_path: Path) -> None:
    write_report(document, tmp_path / "report")

    with pytest.raises(UsageError, match="exists"):
        write_report(document, tmp_path / "report")
    assert write_report(document, tmp_path / "report", force=True).is_file()


def _without_engines(document: dict[str, Any]) -> None:
    del document["engines"]


def _of_another_schema(document: dict[str, Any]) -> None:
    document["schema"] = 99


def _with_a_path_outside(document: dict[str, Any]) -> None:
    next(iter(document["pictures"].values()))["file"] = "crops/../../secret.webp"


def _with_a_wrong_status(document: dict[str, Any]) -> None:
    document["engines"][0]["status"] = "fine"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_engines, "'engines' is a required property"),
        (_of_another_schema, "schema 99"),
        (_with_a_path_outside, "secret"),
        (_with_a_wrong_status, "fine"),
        (lambda document: document.clear(), "not a srdeploy report"),
    ],
    ids=["missing", "schema", "path", "status", "empty"],
)
def test_what_breaks_the_schema_is_refused(document: dict[str, Any], tmp_path: Path, spoil: Any, message: str) -> None:
    write_report(document, tmp_path / "report")
    file = tmp_path / "report" / "report.json"
    stored = json.loads(file.read_text())
    spoil(stored)
    file.write_text(json.dumps(stored))

    with pytest.raises(InputError, match=message):
        read_report(file)


def test_no_report_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no report"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{ not json")
    with pytest.raises(InputError, match="not readable as JSON"):
        read_report(tmp_path)


def test_the_schema_is_a_schema() -> None:
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(schema())


def test_the_page_loads_nothing_and_escapes_names(document: dict[str, Any], tmp_path: Path) -> None:
    html = write_report(document, tmp_path / "report").read_text()

    assert "street &lt;b&gt;" in html
    assert "street <b>" not in html
    assert "default-src 'none'" in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}, "clip paths of the page itself"
    for forbidden in ("http://", "https://", "@import", '<link rel="stylesheet'):
        assert forbidden not in html, forbidden


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium("--disable-gpu") as opened:
        yield opened


@pytest.mark.parametrize(
    ("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light")], ids=["light", "dark", "phone"]
)
def test_the_page_in_a_browser(document: dict[str, Any], tmp_path: Path, browser: Any, width: int, scheme: str) -> None:
    page_file = write_report(document, tmp_path / "report")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))

    page.goto(page_file.as_uri())

    assert page.locator("h1").text_content() == "rcan_x2.srd"
    assert page.locator("#verdict .badge").first.text_content() == "Passed, with engines excluded"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 24)"
    assert dark is (scheme == "dark")
    drawn = [plot.bounding_box() for plot in page.locator("svg.plot").all()]
    assert len(drawn) == 9  # two trade-offs, speed-up, latency, scaling, throughput, streams, search, sensitivity
    assert [row.text_content() for row in page.locator("#search tbody th").all()] == ["1", "2", "3taken"]
    assert all(box is not None and box["width"] > 300 and box["height"] > 100 for box in drawn)
    pictures = page.locator("img").all()
    assert all(image.evaluate("image => image.complete && image.naturalWidth > 0") for image in pictures)
    _move_the_slider(page)
    _drag_the_slider(page)
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"report-{width}-{scheme}.png", full_page=True)
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    context.close()


def _move_the_slider(page: Any) -> None:
    """By keyboard and by choosing other pictures."""
    stage = page.locator(".stage.views").first
    slider = stage.locator("input")
    slider.focus()
    assert stage.evaluate("stage => stage.style.getPropertyValue('--cut')") == "50%"
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    assert stage.evaluate("stage => stage.style.getPropertyValue('--cut')") == "30%"
    over = stage.locator("img.over")
    assert "inset(0px 0px 0px 30%)" in over.evaluate("image => getComputedStyle(image).clipPath")
    assert over.get_attribute("data-key") == "engine1", "the best engine is on the right at first"
    page.locator("[data-compare] select").nth(1).select_option("truth")
    assert stage.locator("img.over").get_attribute("data-key") == "truth"
    page.locator("[data-compare] select").nth(1).select_option("engine0")
    assert "openvino fp32" in page.locator(".heat-words").first.text_content()


def _drag_the_slider(page: Any) -> None:
    """By mouse: the edge follows the pointer."""
    stage = page.locator(".stage.views").last
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    height = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.5, height)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, height, steps=4)
    page.mouse.up()
    cut = float(stage.evaluate("stage => stage.style.getPropertyValue('--cut')").rstrip("%"))
    assert 76 <= cut <= 84


def test_the_theme_button_switches(document: dict[str, Any], tmp_path: Path, browser: Any) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto(write_report(document, tmp_path / "report").as_uri())

    page.locator("#theme").click()

    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 24)"
    page.close()


def test_a_bare_report_has_no_empty_sections(tmp_path: Path) -> None:
    absent = EngineEntry("x fp16", "x", Precision.FP16, reason="no GPU")
    html = write_report(report_document(title="t", contract=contract(), engines=[absent]), tmp_path / "r").read_text()

    for section in (
        "tradeoff",
        "images",
        "worst",
        "latency",
        "scaling",
        "search",
        "sensitivity",
        "calibration",
        "reproduce",
    ):
        assert f'id="{section}"' not in html
    assert "No engine ran on this machine" in html


def test_identical_reports_have_no_regression(document: dict[str, Any]) -> None:
    assert compare(document, copy.deepcopy(document)).regressions == ()


def _slower(line: dict[str, Any]) -> None:
    line["latency"]["end-to-end"]["median_ms"] *= 1.2


def _slower_than_eager(line: dict[str, Any]) -> None:
    for key in ("ratio", "ratio_low", "ratio_high"):
        line["latency"]["end-to-end"][key] /= 1.2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda line: line.update(fidelity_min_db=line["fidelity_min_db"] - 1.0), "fidelity"),
        (lambda line: line.update(fidelity_min_db="nan"), "fidelity"),
        (lambda line: line.update(psnr_drop_db=line["psnr_drop_db"] + 0.02), "Y PSNR change"),
        (lambda line: line.update(size_bytes=int(line["size_bytes"] * 1.1)), "size"),
        (lambda line: line.update(memory_bytes=int(line["memory_bytes"] * 1.5)), "memory"),
        (lambda line: line.update(device_memory_bytes=int(line["device_memory_bytes"] * 1.5)), "GPU memory"),
        (lambda line: line.update(status="failed"), "status"),
        (_slower, "latency end-to-end"),
        (_slower_than_eager, "speed-up end-to-end"),
    ],
    ids=["fidelity", "nan", "psnr", "size", "memory", "gpu-memory", "status", "slower", "slower-than-eager"],
)
def test_each_regression_is_seen_and_its_reverse_is_not(document: dict[str, Any], change: Any, what: str) -> None:
    after = copy.deepcopy(document)
    change(after["engines"][1])

    forward, backward = compare(document, after), compare(after, document)

    assert [(entry.engine, entry.what) for entry in forward.regressions] == [("openvino int8", what)]
    assert backward.regressions == () or after["engines"][1]["fidelity_min_db"] == "nan"


def test_a_change_within_the_intervals_is_no_regression(document: dict[str, Any]) -> None:
    before = copy.deepcopy(document)
    before["engines"][1]["latency"]["end-to-end"].update(ratio_low=6.0, ratio_high=11.0, stable=False)
    after = copy.deepcopy(before)
    _slower_than_eager(after["engines"][1])

    comparison = compare(before, after)

    assert comparison.regressions == ()
    changes = [entry for entry in comparison.changes if entry.what == "speed-up end-to-end"]
    change = next(entry for entry in changes if entry.engine == "openvino int8")
    assert change.change.startswith("-16.7%, -")


def test_a_median_that_became_unstable_is_a_regression_only_without_speed_ups(document: dict[str, Any]) -> None:
    after = copy.deepcopy(document)
    after["engines"][1]["latency"]["end-to-end"]["stable"] = False
    older = copy.deepcopy(document)
    del older["engines"][1]["latency"]["end-to-end"]["ratio_low"]

    assert compare(document, after).regressions == ()
    assert [entry.after for entry in compare(older, after).regressions] == ["unstable"]


def test_tolerances_are_obeyed(document: dict[str, Any]) -> None:
    after = copy.deepcopy(document)
    _slower(after["engines"][1])

    assert compare(document, after, Tolerances(latency=0.25)).regressions == ()


def test_a_missing_engine_is_a_regression_and_a_new_one_is_not(document: dict[str, Any]) -> None:
    after = copy.deepcopy(document)
    del after["engines"][0]

    assert [entry.after for entry in compare(document, after).regressions] == ["missing"]
    assert compare(after, document).regressions == ()


def test_latency_of_another_shape_is_not_compared(document: dict[str, Any]) -> None:
    after = copy.deepcopy(document)
    after["bench"][0]["shape"] = "1x3x8x8"
    _slower(after["engines"][1])

    comparison = compare(document, after)

    assert comparison.regressions == ()
    assert "latency not compared" in [change.change for change in comparison.changes]


def test_latency_of_another_machine_is_not_compared(document: dict[str, Any]) -> None:
    after = copy.deepcopy(document)
    after["bench"][0]["environment"] = {"processor": "another", "cpus": 8, "gpus": [{"name": "a GPU"}]}
    _slower(after["engines"][1])

    comparison = compare(document, after)

    assert comparison.regressions == ()
    (machine,) = [change for change in comparison.changes if change.what == "machine"]
    assert (machine.before, machine.after) == ("a processor", "another, 8 cores, a GPU")


def test_latency_with_processors_in_another_state_is_not_compared(document: dict[str, Any]) -> None:
    near, far = (
        {"processor_exchange": {"lowest": 0.9 * median, "median": median, "highest": 1.1 * median}}
        for median in (1.1, 2.1)
    )
    before, after = copy.deepcopy(document), copy.deepcopy(document)
    before["bench"][0]["environment"] |= near
    after["bench"][0]["environment"] |= far
    _slower(after["engines"][1])

    comparison = compare(before, after)

    assert comparison.regressions == ()
    assert [(change.before, change.after) for change in comparison.changes if "processors" in change.what] == [
        ("1.1x", "2.1x")
    ]
    after["bench"][0]["environment"] |= near
    assert compare(before, after).regressions


@pytest.mark.parametrize(
    ("write", "value", "words"),
    [
        (db_label, math.inf, "∞ (equal)"), (db_label, "nan", "none"), (db_label, 50.04, "50.0 dB"),
        (db_label, None, "–"), (difference_label, "nan", "not finite"),
        (change_label, 0.0512, "−0.051 dB"), (change_label, -0.0001, "+0.000 dB"), (change_label, None, "–"),
        (difference_label, 2 / 255, "2 levels"), (difference_label, 1 / 255, "1 level"),
        (difference_label, 1e-6, "1.0e-06 of 1"),
        (size_label, 1_234_567, "1.18 MiB"), (size_label, 12, "12 B"), (size_label, None, "–"),
        (tick_label, 20000.0, "20k"), (tick_label, 0.02, "0.02"), (tick_label, 3e6, "3M"), (tick_label, 0.0, "0"),
        (ratio_label, {"ratio": 5.13, "ratio_low": 4.91, "ratio_high": 5.31}, "5.1×, 4.9 to 5.3"),
        (ratio_label, {"ratio": 5.13}, "5.13×"), (ratio_label, None, "–"),
        (median_label, {"median_ms": 24.0, "stable": False, "ci_share": 0.12}, "24 ms ±12 %"),
        (median_label, {"median_ms": 24.0, "stable": False}, "unstable"),
    ],
)  # fmt: skip
def test_numbers_as_words(write: Any, value: Any, words: str) -> None:
    assert write(value) == words


def test_the_front_joins_what_nothing_beats() -> None:
    assert plots._front([(3, 50), (2, 60), (2.5, 40), (5, 30)]) == [(5, 30), (3, 50), (2, 60)]


def test_a_drawing_follows_the_theme_and_holds_no_markup_of_names() -> None:
    figure, axes = new_figure(2)
    axes.plot([1, 2], [1, 2], "o", color=series_color(9), gid="dot")

    drawing = svg_of(figure, "a <b>", [("dot", "1 < 2")])

    assert re.findall("#[0-9a-f]{6}", drawing) == [], "every color comes from the style sheet"
    assert "var(--s1)" in drawing
    assert "<style" not in drawing
    assert "font-family" not in drawing
    assert '<g id="dot"><title>1 &lt; 2</title>' in drawing
    assert drawing.startswith('<svg class="plot" role="img" aria-label="a &lt;b&gt;" viewBox="0 0 518.4 144">')


def test_a_label_covers_no_other_dot() -> None:
    _, axes = new_figure(4)
    axes.set(xlim=(0, 100), ylim=(0, 100))

    label_points(axes, [(50, 50, "a long label over the next dot", "#010101"), (60, 50, "b", "#010101")])

    first, second = (text.xyann[1] for text in axes.texts)
    assert abs(first) >= 12, "moved below the second dot"
    assert second == 0


def test_heat_maps_show_scale_and_nan() -> None:
    error = np.array([[0.0, 3.1 / 255], [np.nan, 1.0 / 255]], np.float32)

    assert heat_peak(error) == pytest.approx(4 / 255)
    assert heat_peak(np.zeros((2, 2), np.float32)) == pytest.approx(1 / 255)
    colours = heat_map(error, heat_peak(error))
    assert tuple(colours[1, 0]) == (0, 255, 255)
    assert tuple(colours[0, 0]) == (0, 0, 4)
    assert colours[0, 1].sum() > colours[1, 1].sum()


def test_picture_names_are_safe_and_different() -> None:
    pictures = CropImages()
    pixels = np.zeros((2, 2, 3), np.uint8)

    keys = [pictures.add(name, pixels) for name in ("a b/../c", "a b/../c", "…")]

    assert keys == ["a-b-..-c", "a-b-..-c-2", "picture"]


def test_json_values() -> None:
    assert jsonable({"a": (1, np.float32(2.5), Path("x"), math.inf, None, True)}) == {
        "a": [1, 2.5, "x", "inf", None, True]
    }
