"""demo: needs nothing but the source tree, and says so where there is none."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from srdeploy.cli import demo
from srdeploy.cli.demo import NETWORKS, examples_folder
from srdeploy.cli.main import run
from srdeploy.core.errors import CapabilityError, InputError
from srdeploy.runtime.bundle import read_bundle

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "tests" / "data" / "checkpoints"


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples folder with networks of random weights, which take a fraction of the time."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(ROOT / "examples" / "photos", folder / "photos")
    for photo in (folder / "photos").rglob("*.png"):  # quarters are enough for a test
        with Image.open(photo) as picture:
            left, top = (0, 0) if photo.name != demo.PICTURE else (demo.BOX[0] - 4, demo.BOX[1] - 4)
            small = picture.crop((left, top, left + 176, top + 128))
        small.save(photo)
    shutil.copy(CHECKPOINTS / "yulunzhang_rcan_x2" / "RCAN_BIX2.pt", folder / NETWORKS["rcan_x2"])
    shutil.copy(CHECKPOINTS / "yjn870_srdensenet_x4" / "srdensenet_x4.pth", folder / NETWORKS["srdensenet_x4"])
    return folder


@pytest.mark.advice("cli/demo.py:command", "next: srdeploy upscale")
def test_the_demo_ends_with_a_bundle_photos_a_picture_and_the_next_command(
    examples: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "demo-output"
    monkeypatch.setattr(demo, "BOX", (4, 4, 164, 124))

    code = run(["demo", "--examples", str(examples), "--network", "rcan_x2", "--json", "-o", str(output)])

    captured = capfd.readouterr()
    assert code in (0, 6), captured.err  # random weights: INT8 may or may not reach its gate
    document = json.loads(captured.out)["rcan_x2"]
    read_bundle(output / "rcan_x2.srd").verify()
    photos = sorted(path.name for path in (output / "rcan_x2_photos").glob("*.png"))
    assert photos == ["cat.png", "coffee.png", "shuttle.png"]
    with Image.open(output / "rcan_x2_photos" / "cat.png") as large:
        assert large.size == (352, 256)
    with Image.open(document["before_after"]) as picture:
        assert picture.width > 3 * 300
    lines = captured.err.splitlines()
    assert any(line.startswith("report: ") and line.endswith("rcan_x2.srd/report/report.html") for line in lines)
    advised = shlex.split(lines[-1])
    assert advised[:3] == ["next:", "srdeploy", "upscale"]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (24, 20)).save("YOUR_PHOTO.jpg")
    assert run(advised[2:]) == 0


def test_an_existing_output_is_kept_without_force(examples: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")

    assert run(["demo", "--examples", str(examples), "-o", str(tmp_path)]) == 2

    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_without_a_source_tree_the_demo_says_where_the_examples_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "site-packages" / "srdeploy" / "cli" / "demo.py"))

    with pytest.raises(CapabilityError, match="make demo"):
        examples_folder(None)


def test_a_folder_that_lacks_a_network_is_refused_with_its_name(examples: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(examples, tmp_path / "examples")
    (copy / NETWORKS["srdensenet_x4"]).unlink()

    with pytest.raises(InputError, match=r"holds no srdensenet_x4_demo\.pth"):
        examples_folder(copy)
