"""Next steps of the export: bugs that are reported, and weights that are looked at."""

import importlib.metadata
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from checkpoint_fuzzing.seeds import official_rcan, random_state, torch_file
from next_steps.conftest import User
from next_steps.inventory import ROOT
from next_steps.test_calibration import changed_weights

from srdeploy.core.contract import GraphForm
from srdeploy.core.errors import ExportError
from srdeploy.export.canonical import canonical_graph
from srdeploy.export.checks import check_against_network, check_structure
from srdeploy.export.exporter import _captured
from srdeploy.export.form_checks import _checked_luma, _difference
from srdeploy.models.checkpoint.load import load_checkpoint


def reported(user: User, error: ExportError) -> None:
    """Run the command whose output a report needs."""
    step = error.next_step or ""
    printed = user.runs(step[step.index("srdeploy doctor") :])
    assert "torch" in json.loads(printed[printed.index("{") : printed.rindex("}") + 1])["packages"]


@pytest.mark.advice("export/checks.py:check_structure", "the output of: srdeploy doctor --json")
@pytest.mark.advice("export/checks.py:_deviation", "the output of: srdeploy doctor --json")
def test_a_graph_that_is_wrong(user: User) -> None:
    changed_weights(lambda weights: weights * 1.5)
    loaded = load_checkpoint(Path("good.pt"))
    cut = onnx.load("good.onnx")
    del cut.graph.node[3:]
    onnx.save(cut, "cut.onnx")

    with pytest.raises(ExportError, match="not valid") as invalid:
        check_structure(Path("cut.onnx"))
    with pytest.raises(ExportError, match="differs from the network") as wrong:
        check_against_network(Path("changed.onnx"), loaded.reference, loaded.contract())
    reported(user, invalid.value)
    reported(user, wrong.value)


@pytest.mark.advice("export/checks.py:_deviation", "the output of: srdeploy doctor --json")
def test_a_graph_that_does_not_run(user: User) -> None:
    loaded = load_checkpoint(Path("good.pt"))
    graph = onnx.load("good.onnx")
    shape = onnx.numpy_helper.from_array(np.array([7], np.int64), "seven")
    graph.graph.initializer.append(shape)
    graph.graph.node.insert(0, onnx.helper.make_node("Reshape", ["input", "seven"], ["flat"], name="flat"))
    graph.graph.output.append(onnx.helper.make_tensor_value_info("flat", onnx.TensorProto.FLOAT, [7]))
    onnx.save(graph, "failing.onnx")

    with pytest.raises(ExportError, match="fails") as caught:
        check_against_network(Path("failing.onnx"), loaded.reference, loaded.contract())
    reported(user, caught.value)


@pytest.mark.advice("export/exporter.py:_captured", "the output of: srdeploy doctor --json")
def test_a_layer_that_the_exporter_does_not_know(user: User) -> None:
    class Unknown(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("a layer of the future")

    folded: Any = SimpleNamespace(network=Unknown())

    with pytest.raises(ExportError, match="the PyTorch exporter failed") as caught:
        _captured(folded, load_checkpoint(Path("good.pt")), 20)
    reported(user, caught.value)


@pytest.mark.advice(
    "export/canonical.py:_check_form", "use the torch version pinned in constraints.txt, or report this"
)
def test_a_form_of_another_torch(user: User) -> None:
    """The pinned version is the one whose exports the other tests check."""
    text = (
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n,3,h,w] input) => (float[n,3,h,w] output) '
        "{ output = Transpose <perm = [0, 1, 3, 2]> (input) }"
    )

    with pytest.raises(ExportError):
        canonical_graph(onnx_ir.from_proto(onnx.parser.parse_model(text)), name="a", pads_to_multiple=False)
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert importlib.metadata.version("torch").partition("+")[0] == pinned[1]


@pytest.mark.advice("export/form_checks.py:_checked_luma", "the output of: srdeploy doctor --json")
@pytest.mark.advice("export/form_checks.py:_difference", "the output of: srdeploy doctor --json")
def test_a_form_that_is_wrong(user: User) -> None:
    plain = np.full((1, 1, 2, 2), 0.5, np.float32)

    with pytest.raises(ExportError, match="luma") as luma:
        _checked_luma(np.zeros((1, 3, 2, 2), np.float32), plain)
    with pytest.raises(ExportError, match="returns") as other_type:
        _difference(plain.astype(np.uint8), plain, GraphForm(), "1x1x2x2")
    with pytest.raises(ExportError, match="differs") as other_values:
        _difference(plain + 1, plain, GraphForm(), "1x1x2x2")
    for caught in (luma, other_type, other_values):
        reported(user, caught.value)


@pytest.mark.advice("calibration/fp32.py:_refuse_unsuitable", "put the result into this form with: srdeploy export")
@pytest.mark.advice("export/forms.py:check_form", "start from the graph that it was made from")
@pytest.mark.advice("cli/pipeline/opening.py:open_candidates", "name the plain graph that it was made from")
@pytest.mark.advice("cli/export.py:command", "next: srdeploy upscale")
def test_a_graph_in_a_form_for_a_consumer(user: User) -> None:
    command = user.next("export good.onnx --io uint8 -o bytes.onnx")
    user.runs(command.replace("PICTURE", "photo.png").replace("OUTPUT", "out.png"))

    user.refused("quantize bytes.onnx --precision fp16 -o half.onnx")
    user.runs("quantize good.onnx --precision fp16 -o half.onnx")
    user.runs("export half.onnx --io uint8 -o half_bytes.onnx")
    user.refused("export bytes.onnx --static 1x3x16x16 -o static.onnx")
    user.runs("export good.onnx --static 1x3x16x16 -o static.onnx")
    user.refused("verify bytes.onnx --against good.pt --images photo.png")
    user.runs("verify good.onnx --against good.pt --images photo.png")


@pytest.mark.advice("export/forms.py:check_form", "omit it: the network takes RGB already")
@pytest.mark.advice("export/forms.py:_check_shape", "choose a smaller shape; larger images are tiled")
@pytest.mark.advice("cli/export.py:_from_graph", "omit it")
@pytest.mark.advice("cli/export.py:_from_graph", "add --static, --io uint8, --color-wrapper or --target web")
def test_options_of_forms(user: User) -> None:
    user.runs("export luma.pt -o luma.onnx")

    user.refused("export good.onnx --color-wrapper --io uint8 -o a.onnx")
    user.refused("export good.onnx --static 1x3x90000x90000 -o a.onnx")
    user.refused("export good.onnx --opset 21 --io uint8 -o a.onnx")
    user.refused("export good.onnx -o a.onnx")
    for words in (
        "good.onnx --io uint8",
        "good.onnx --static 1x3x16x16",
        "good.onnx --target web",
        "luma.onnx --color-wrapper",
    ):
        user.runs(f"export {words} -o a.onnx --force")


@pytest.mark.advice("export/checks.py:_check_output", "check the weights with: srdeploy inspect CHECKPOINT")
def test_weights_that_overflow(user: User) -> None:
    state = {name: value * 1e20 for name, value in random_state(official_rcan()).items()}
    Path("large.pt").write_bytes(torch_file(state, legacy=False))

    message = user.refused("export large.pt -o large.onnx")

    user.runs(message[message.index("srdeploy inspect") :].replace("CHECKPOINT", "large.pt"))
