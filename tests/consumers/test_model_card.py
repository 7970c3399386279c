"""The card of a bundle is read by the Hugging Face Hub's own library."""

import json
from pathlib import Path

from consumers.conftest import Run

from srdeploy.cli.pipeline.card import model_card
from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.runtime.report.document import EngineEntry, report_document

READ = """
import json, sys
from huggingface_hub import ModelCard
card = ModelCard.load(sys.argv[1])
print(json.dumps({"data": card.data.to_dict(), "text": card.text}))
"""


def test_the_hub_reads_the_metadata(packages: Run, tmp_path: Path) -> None:
    contract = ModelContract("rcan", {}, 2, "rgb", Precision.FP32, None, 1e6, 256, "0" * 64)
    engine = EngineEntry("openvino fp32", "openvino", Precision.FP32, file="engines/a.blob", size_bytes=10)
    (tmp_path / "README.md").write_text(model_card(report_document(title="a.srd", contract=contract, engines=[engine])))

    done = packages("python", "-c", READ, tmp_path / "README.md")

    card = json.loads(done.stdout)
    assert card["data"]["library_name"] == "srdeploy"
    assert card["data"]["pipeline_tag"] == "image-to-image"
    assert card["data"]["tags"] == ["super-resolution", "image-upscaling", "rcan", "onnx", "openvino"]
    assert "license" not in card["data"], "it is the owner's to add"
    assert card["text"].lstrip().startswith("# a\n")

    text = (tmp_path / "README.md").read_text().replace("---\n# license", "---\nlicense: apache-2.0\n# license", 1)
    (tmp_path / "README.md").write_text(text)
    done = packages("python", "-c", READ, tmp_path / "README.md")
    assert json.loads(done.stdout)["data"]["license"] == "apache-2.0"
