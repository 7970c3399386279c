"""Next steps about calibration, quantization and compression."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from next_steps.conftest import SMALL, User
from onnx import numpy_helper

from srdeploy.calibration.half import convert_to_half
from srdeploy.calibration.images.dataset import make_calibration_set
from srdeploy.calibration.int8.placement import RECIPES, place
from srdeploy.calibration.int8.ranges import read_ranges
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.quantize import quantize
from srdeploy.calibration.search.readback import read_back
from srdeploy.core.errors import BuildError, InputError, PrecisionError, UsageError
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.precision import Precision, Target
from srdeploy.core.progress import Advance
from srdeploy.core.runner import Runner, RunnerInfo
from srdeploy.runtime.engines.registry import open_engine

INT8 = f"quantize good.onnx --precision int8 --images photos {SMALL}"
FP16 = "quantize good.onnx --precision fp16"


def changed_weights(change: Callable[[np.ndarray], np.ndarray], name: str = "changed.onnx", layer: int = 0) -> None:
    """Write the good graph with the weights of one convolution changed."""
    model = onnx.load("good.onnx")
    first = [node for node in model.graph.node if node.op_type == "Conv"][layer]
    for tensor in model.graph.initializer:
        if tensor.name == first.input[1]:
            tensor.CopyFrom(
                numpy_helper.from_array(change(numpy_helper.to_array(tensor)).astype(np.float32), tensor.name)
            )
    onnx.save(model, name)


def thin_network() -> None:
    """Write the good graph with convolutions of nearly rank two, which can be compressed."""
    model = onnx.load("good.onnx")
    random = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [8, 8, 3, 3]:
            product = random.standard_normal((8, 2)) @ random.standard_normal((2, 72)) / 30
            weights = product + random.standard_normal((8, 72)) / 3000
            tensor.CopyFrom(numpy_helper.from_array(weights.reshape(8, 8, 3, 3).astype(np.float32), tensor.name))
    onnx.save(model, "thin.onnx")


# ----------------------------------------------------------------------------------------------------------------------
# Graphs


@pytest.mark.advice("calibration/fp32.py:read_fp32_graph", "export it again")
@pytest.mark.advice("calibration/fp32.py:_refuse_unsuitable", "export the checkpoint again with --opset 20")
def test_graphs_that_are_not_valid_or_too_old(user: User) -> None:
    cut = onnx.load("good.onnx")
    del cut.graph.node[3:]
    onnx.save(cut, "cut.onnx")
    old = onnx.load("good.onnx")
    old.opset_import[0].version = 11
    onnx.save(old, "old.onnx")

    user.refused("quantize cut.onnx --precision fp16 -o half.onnx")
    user.refused("quantize old.onnx --precision fp16 -o half.onnx")
    user.runs("export good.pt --opset 20 -o again.onnx")
    user.runs("quantize again.onnx --precision fp16 -o half.onnx")


@pytest.mark.advice("calibration/fp32.py:_refuse_unsuitable", "quantize the file that `srdeploy export` wrote")
def test_a_graph_that_is_quantized_already(user: User) -> None:
    user.refused("quantize int8.onnx --precision fp16 -o half.onnx")
    user.runs(f"{FP16} -o half.onnx")


@pytest.mark.advice("calibration/half.py:_converted", "use --precision bf16")
def test_weights_beyond_fp16(user: User) -> None:
    """On the command line such layers stay FP32; a caller that names the layers to keep may forget them."""
    changed_weights(lambda weights: np.sign(weights) * 1e5, layer=3)

    with pytest.raises(PrecisionError):
        convert_to_half(onnx.load("changed.onnx"), Precision.FP16, ())
    user.runs("quantize changed.onnx --precision bf16 -o half.onnx")


@pytest.mark.advice("calibration/observe.py:_check_finite", "value range with: srdeploy inspect CHECKPOINT")
def test_activations_that_are_not_finite(user: User) -> None:
    changed_weights(lambda weights: np.sign(weights) * 3e38)

    message = user.refused(f"quantize changed.onnx --precision int8 --images photos {SMALL} -o a.onnx")
    command = re.search(r"srdeploy inspect CHECKPOINT", message)
    assert command is not None
    assert "value_range" in user.runs(command[0].replace("CHECKPOINT", "good.pt"))


# ----------------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.advice("calibration/quantize.py:_check", "pass --images DIR; random data would give random ranges")
def test_no_images(user: User) -> None:
    user.refused("quantize good.onnx --precision int8 -o a.onnx")
    user.runs(f"{INT8} -o a.onnx")


@pytest.mark.advice(
    "calibration/images/dataset.py:_refuse_bad", "remove them; quantize and compress use the rest with --skip-bad"
)
@pytest.mark.parametrize(
    "command",
    [
        f"{INT8} -o a.onnx",
        "compress thin.onnx --images photos --target tensorrt --max-psnr-drop 3 --time-budget 5 --threads 1 -o a.onnx",
    ],
    ids=["quantize", "compress"],
)
def test_an_image_that_cannot_be_used(user: User, command: str) -> None:
    thin_network()
    Path("photos/broken.png").write_text("no picture")

    user.refused(command)
    user.runs(f"{command} --skip-bad --force")
    Path("photos/broken.png").unlink()
    user.runs(f"{command} --force")


@pytest.mark.advice("calibration/images/dataset.py:_cut", "run the command again")
def test_an_image_that_changes_while_it_is_read(user: User) -> None:
    contract = read_graph(Path("good.onnx")).contract
    intact = {path: path.read_bytes() for path in Path("photos").iterdir()}

    class Meanwhile:
        """A copy of the pictures is under way when they are read for the second time."""

        @contextmanager
        def task(self, description: str, total: float | None = None) -> Iterator[Advance]:
            if description == "cutting windows":
                for path in intact:
                    path.write_bytes(intact[path][:1000])
            yield lambda amount=1, note=None: None

        def note(self, message: str) -> None:
            pass

    with pytest.raises(InputError, match="changed while it was read"):
        make_calibration_set(Path("photos"), contract=contract, crop=16, progress=Meanwhile())
    for path, data in intact.items():
        path.write_bytes(data)
    assert len(make_calibration_set(Path("photos"), contract=contract, crop=16)) > 0


@pytest.mark.advice(
    "calibration/images/effort.py:plan_windows",
    "free memory, allow more of it with --memory, or use srdeploy quantize --crop-size",
)
def test_a_memory_budget_below_one_crop(user: User) -> None:
    command = "quantize good.onnx --precision int8 --images photos --threads 1 -o a.onnx"
    compress = (
        "compress thin.onnx --images photos --target tensorrt --max-psnr-drop 3 --time-budget 5 --threads 1 -o b.onnx"
    )

    thin_network()
    message = user.refused(f"{command} --memory 1MiB")
    needed = re.search(r"at least ([\d.]+) (\w+)", message)
    assert needed is not None
    enough = "".join(needed.groups())
    user.runs(f"{command} --memory {enough}")
    user.refused(f"{command} --crop-size 80 --memory {enough} --force")
    user.runs(f"{command} --crop-size 40 --memory {enough} --force")
    user.refused(f"{compress} --memory 1MiB")
    user.runs(f"{compress} --memory 2GiB")


# ----------------------------------------------------------------------------------------------------------------------
# Ranges


@pytest.mark.advice("calibration/int8/ranges.py:read_ranges", "a ranges.json that srdeploy quantize wrote")
@pytest.mark.advice("calibration/int8/ranges.py:read_ranges", "leave --ranges out to calibrate this model")
def test_ranges_of_another_model(user: User) -> None:
    changed_weights(lambda weights: weights * 0.9)
    words = f"--precision int8 --images photos {SMALL} -o a.onnx"

    with pytest.raises(UsageError):
        read_ranges(Path("ranges.json"), model_sha256="")
    user.runs(f"quantize good.onnx --ranges int8.calibration/ranges.json {words}")
    user.refused(f"quantize changed.onnx --ranges int8.calibration/ranges.json {words} --force")
    user.runs(f"quantize changed.onnx {words} --force")


@pytest.mark.advice("calibration/quantize.py:_check_ranges", "leave --ranges out to collect new ones")
@pytest.mark.advice(
    "calibration/quantize.py:_check_ranges", "the --target, --keep and --deconvolution of the run that wrote it"
)
def test_ranges_of_another_layout(user: User) -> None:
    ranges = "--ranges int8.calibration/ranges.json"
    keep = "--keep upsampler.0.convolution"

    user.refused(f"{INT8} {ranges} {keep} -o a.onnx")
    user.runs(f"{INT8} {ranges} -o a.onnx")
    user.runs(f"{INT8} {keep} -o b.onnx")


# ----------------------------------------------------------------------------------------------------------------------
# Bounds


@pytest.mark.advice(
    "calibration/search/choose.py:_meet_bound",
    "allow a larger drop, search longer with srdeploy quantize --time-budget, or use FP16",
)
def test_a_bound_out_of_reach(user: User) -> None:
    user.refused(f"{INT8} --min-fidelity 149 --time-budget 1 -o a.onnx")
    user.runs(f"{INT8} --min-fidelity 20 --time-budget 60 -o a.onnx")
    user.runs(f"{FP16} -o half.onnx")


@pytest.mark.advice("calibration/quantize.py:_check_bound", "allow a larger drop, or use FP16")
def test_a_bound_that_fp16_around_the_int8_layers_misses(user: User, small_onnx: Callable[..., Path]) -> None:
    wide = small_onnx("wide.onnx")
    calibration = make_calibration_set(Path("photos"), contract=read_graph(wide).contract, crop=16, count=4, whole=1)
    found = quantize(
        wide, Path("a.onnx"), precision=Precision.INT8, target=Target.TENSORRT, calibration=calibration,
        options=QuantizeOptions(method="minmax", strength=0.0),
    )  # fmt: skip

    assert found.choice is not None
    assert found.quality is not None
    searched, finished = found.choice.taken.quality.fidelity_db, found.quality.fidelity_db
    assert finished < searched
    command = f"quantize wide.onnx --precision int8 --target tensorrt --images photos {SMALL} -o b.onnx"

    user.refused(f"{command} --min-fidelity {(searched + finished) / 2}")
    user.runs(f"{command} --min-fidelity {finished - 0.5}")
    user.runs("quantize wide.onnx --precision fp16 --target tensorrt -o half.onnx")


@pytest.mark.advice(
    "calibration/compress/result.py:NothingGainedError.__init__",
    "allow a larger --max-psnr-drop, search longer with --time-budget, or use the graph as it is",
)
def test_a_bound_that_allows_no_compression(user: User) -> None:
    thin_network()
    command = "compress thin.onnx --images photos --target tensorrt --time-budget 20 --threads 1 -o small.onnx"

    user.refused(f"{command} --max-psnr-drop 0.0000001")
    user.runs(f"{command} --max-psnr-drop 3")
    user.runs("build good.onnx --engine onnxruntime -o a.engine")


@pytest.mark.advice(
    "calibration/compress/compress.py:read_original",
    "compress the file that `srdeploy export` wrote, with a larger --max-psnr-drop",
)
def test_a_graph_that_is_compressed_already(user: User) -> None:
    thin_network()
    options = "--images photos --target tensorrt --time-budget 5 --threads 1"
    user.runs(f"compress thin.onnx {options} --max-psnr-drop 3 -o small.onnx")

    user.refused(f"compress small.onnx {options} --max-psnr-drop 3 -o smaller.onnx")
    user.runs(f"compress thin.onnx {options} --max-psnr-drop 6 -o smaller.onnx")


@pytest.mark.advice("calibration/search/choose.py:_check_kept", "use --precision fp16")
def test_a_network_too_small_for_int8(user: User) -> None:
    user.refused(f"{INT8} --target tensorrt -o a.onnx")
    user.runs(f"{FP16} --target tensorrt -o a.onnx")


# ----------------------------------------------------------------------------------------------------------------------
# Engines that compute something else


@pytest.mark.advice(
    "calibration/search/choose.py:_check_as_written",
    "try srdeploy quantize with --weight-bits 7, --deconvolution rewrite or another --target",
)
def test_an_engine_that_computes_something_else(user: User) -> None:
    """An engine with another bias at the network's end takes the place of one that overflows."""
    contract = read_graph(Path("good.onnx")).contract
    calibration = make_calibration_set(Path("photos"), contract=contract, crop=16, count=4, whole=1)

    def defective(path: Path) -> Runner:
        model = onnx.load(path)
        biases = [tensor for tensor in model.graph.initializer if tensor.name.endswith("bias")]
        for tensor in biases:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.5), tensor.name))
        onnx.save(model, path)
        return open_engine(path, engine="openvino", threads=1, parity=True)

    with pytest.raises(BuildError, match="otherwise than it is written"):
        quantize(
            Path("good.onnx"), Path("a.onnx"), precision=Precision.INT8, target=Target.OPENVINO,
            calibration=calibration, open_engine=defective,
        )  # fmt: skip
    for words in ("--weight-bits 7", "--deconvolution rewrite", "--target onnxruntime"):
        user.runs(f"{INT8} {words} -o a.onnx --force")


@pytest.mark.advice(
    "calibration/search/readback.py:read_back",
    "leave the others float (srdeploy quantize --keep), or quantize for another --target",
)
def test_an_engine_that_leaves_layers_in_float(user: User) -> None:
    graph = Graph(onnx.load("good.onnx"))
    placement = place(graph, RECIPES[Target.OPENVINO])
    contract = read_graph(Path("good.onnx")).contract
    built = {"convolutions": {"int8": len(placement.layers) - 1, "fp32": 1}}

    with pytest.raises(BuildError):
        read_back(RunnerInfo("a", "openvino", "cpu", contract, "INT8", versions={}, built=built), graph, placement)
    user.runs(f"{INT8} --keep {placement.layers[0]} -o a.onnx")
    user.runs(f"{INT8} --target onnxruntime -o b.onnx")


@pytest.mark.advice("cli/quantize.py:_show", "(--keep one of them to keep them separate)")
def test_layers_that_became_one(user: User, shelf: Path) -> None:
    printed = user.runs(f"{INT8} -o a.onnx")
    names = re.search(r"(\S+), (\S+) became one exact convolution", printed)
    assert names is not None, printed

    for name in names.groups():
        assert "became one" not in user.runs(f"{INT8} --keep {name} -o {name}.onnx")
