"""A bundle that OpenSSF's model_signing signed stays a valid bundle, and an edited one is named by both."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from consumers.conftest import Run

from srdeploy.cli.main import run
from srdeploy.core.contract import ModelContract
from srdeploy.core.manifest import Source
from srdeploy.core.precision import Precision
from srdeploy.runtime.bundle import write_bundle_manifest

CONTRACT = ModelContract("rcan", {}, 2, "rgb", Precision.FP32, None, 1e6, 256, "0" * 64)
DOCS = Path(__file__).parents[2] / "docs" / "consumers.md"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "rcan_x4.srd"
    (folder / "engines").mkdir(parents=True)
    (folder / "engines" / "a.onnx").write_bytes(b"graph")
    (folder / "README.md").write_text("# card\n")
    write_bundle_manifest(folder, contract=CONTRACT, checkpoint=Source("checkpoint", "a.pt", "0" * 64), engines=[])
    return folder


def documented(packages: Run, bundle: Path) -> list["subprocess.CompletedProcess[str]"]:
    """Run the commands of the manual's section on signing, but the installation."""
    section = DOCS.read_text().split("## Signing")[1].split("```sh\n")[1].split("```")[0]
    results = []
    for line in section.splitlines()[1:]:
        words = line.split()
        names = {"rcan_x4.srd": str(bundle), "rcan_x4.srd/model.sig": str(bundle / "model.sig")}
        words = [names.get(word, str(bundle.parent / word) if word.startswith("key.") else word) for word in words]
        if words[0] == "openssl":
            results.append(subprocess.run(words, capture_output=True, text=True, check=True))
        else:
            results.append(packages(*words))
    return results


def test_the_documented_commands_sign_and_verify(
    packages: Run, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, signed, verified = documented(packages, bundle)

    assert signed.returncode == verified.returncode == 0, signed.stderr + verified.stderr
    assert run(["inspect", str(bundle), "--json"]) == 0
    captured = capsys.readouterr()
    signature = json.loads(captured.out)["signature"]
    assert (signature["file"], signature["method"]) == ("model.sig", "key")
    assert "model.sig (key), not verified" in captured.err

    printed = [str(bundle.parent / word) if word == "key.pub" else word for word in signature["verify_command"]]
    assert packages(*printed).returncode == 0, "the printed command verifies it"


def test_an_edited_file_is_named_by_both(packages: Run, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documented(packages, bundle)
    (bundle / "engines" / "a.onnx").write_bytes(b"other")

    assert run(["inspect", str(bundle)]) == 3
    assert "a.onnx" in capsys.readouterr().err
    refused = documented_verify(packages, bundle)
    assert refused.returncode != 0
    assert re.search(r"a\.onnx", refused.stdout + refused.stderr)


def test_another_key_verifies_nothing(packages: Run, bundle: Path) -> None:
    documented(packages, bundle)
    other = bundle.parent / "key.pem"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", other], check=True)
    subprocess.run(["openssl", "ec", "-in", other, "-pubout", "-out", bundle.parent / "key.pub"],
                   check=True, capture_output=True)  # fmt: skip

    assert documented_verify(packages, bundle).returncode != 0


def documented_verify(packages: Run, bundle: Path) -> "subprocess.CompletedProcess[str]":
    arguments = ["verify", "key", "--public_key", bundle.parent / "key.pub", "--signature", bundle / "model.sig"]
    return packages("model_signing", *arguments, bundle)
