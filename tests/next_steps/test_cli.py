"""Next steps of the verbs: refused options, the commands they print last, and the examples at the end of --help."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from next_steps.conftest import SMALL, User, photo
from next_steps.inventory import ROOT
from next_steps.test_calibration import changed_weights, thin_network

from srdeploy.cli import demo
from srdeploy.cli.main import VERBS, cli
from srdeploy.core.errors import CapabilityError

CHECK = "verify good.onnx --against good.pt --images photo.png"
BRIEF = {
    # Options that make an advised command short.
    "bench": "--seconds 0.05 --min-runs 5 --no-baselines --allow-unstable",
    "verify": "--limit 1",
    "quantize": f"{SMALL} --force",
}
WRITTEN = {"CHECKPOINT": "good.pt", "IMAGES": "photos", "DIR": "photos", "IMAGE": "photo.png", "OUTPUT": "out.png"}
"""What a user writes for the words in capitals."""


def advised(command: str) -> str:
    """Return an advised command as a user types it."""
    words = [WRITTEN.get(word, word) for word in shlex.split(command)]
    return f"{shlex.join(words)} {BRIEF.get(words[1], '')}"


# ----------------------------------------------------------------------------------------------------------------------
# The next command


@pytest.mark.advice("cli/inspect.py:_next", "next: srdeploy export")
@pytest.mark.advice("cli/export.py:command", "next: srdeploy verify")
@pytest.mark.advice("cli/verify.py:command", "next: srdeploy bench")
@pytest.mark.advice("cli/bench.py:command", "next: srdeploy verify")
def test_from_a_checkpoint_to_its_latency(user: User) -> None:
    command = "srdeploy inspect good.pt"
    verbs = []
    for _ in range(5):
        verbs.append(command.split()[1])
        command = user.next(advised(command))

    assert verbs == ["inspect", "export", "verify", "bench", "verify"]


@pytest.mark.advice("cli/quantize.py:_next", "next: srdeploy build")
@pytest.mark.advice("cli/build.py:command", "next: srdeploy verify")
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_from_a_graph_to_an_engine(user: User, engine: str) -> None:
    command = f"srdeploy quantize good.onnx --precision fp16 --target {engine} -o a.onnx"
    verbs = []
    for _ in range(3):
        verbs.append(command.split()[1])
        command = user.next(command if not verbs[1:] else advised(command))

    assert verbs == ["quantize", "build", "verify"]


@pytest.mark.advice("cli/inspect.py:_next", "next: srdeploy build")
@pytest.mark.advice("cli/inspect.py:_next", "next: srdeploy upscale")
@pytest.mark.advice("cli/upscale.py:command", "next: srdeploy inspect")
def test_from_a_graph_to_a_picture(user: User) -> None:
    build = user.next("inspect fp16.onnx")
    user.runs(build)
    upscale = user.next(f"inspect {build.split()[-1]}")
    user.runs(user.next(upscale))


@pytest.mark.advice("cli/build.py:command", "next: srdeploy inspect")
def test_the_next_command_after_a_build_for_other_machines(user: User) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    shapes = "--min-shape 1x3x16x16 --opt-shape 1x3x24x24 --max-shape 1x3x32x32"

    command = user.next(f"build fp16.onnx --engine tensorrt-rtx {shapes} -o a.rtx")

    assert command == "srdeploy inspect a.rtx"
    user.runs(command)


@pytest.mark.advice("cli/compress.py:_next", "next: srdeploy quantize")
def test_the_next_command_after_compression(user: User) -> None:
    thin_network()
    command = user.next("compress thin.onnx --images photos --target tensorrt --max-psnr-drop 3 --threads 1 -o a.onnx")

    user.runs(command)


DEPLOY = "deploy good.pt --images photos --size 24x24 --threads 1"


@pytest.mark.advice("cli/inspect.py:_compression", " more changes; all of them with --json")
@pytest.mark.advice("cli/pipeline/engines.py:checked_placements", "add, for example, --max-psnr-drop 0.02")
def test_compressed_graphs(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    thin_network()
    user.runs("compress thin.onnx --images photos --target tensorrt --max-psnr-drop 3 --time-budget 5 --threads 1 "
              "-o small.onnx")  # fmt: skip
    monkeypatch.setattr("srdeploy.cli.inspect._LAYERS_SHOWN", 0)  # the network has few layers

    printed = user.runs("inspect small.onnx")
    more = re.search(r"and (\d+) more changes", printed)
    assert more is not None
    document = user.runs("inspect small.onnx --json")
    assert document.count('"error_share"') == int(more[1])
    line = user.refused(f"{DEPLOY} --device cpu --engine onnxruntime --compress -o a.srd")
    bound = line.rpartition("for example, ")[2]
    user.runs(f"{DEPLOY} --device cpu --engine onnxruntime --compress {bound} -o a.srd")


@pytest.mark.advice("cli/deploy.py:command", "next: srdeploy upscale")
@pytest.mark.advice("cli/inspect.py:_next", "next: srdeploy upscale")
@pytest.mark.advice("cli/pipeline/card.py:_use", "photo.png -o photo_upscaled.png")
@pytest.mark.advice("cli/pipeline/card.py:_verify", "srdeploy inspect a.srd")
@pytest.mark.advice("cli/pipeline/card.py:_verify", "srdeploy verify a.srd/engines")
@pytest.mark.advice("cli/package.py:command", "next: srdeploy inspect")
@pytest.mark.advice("cli/package.py:_targets", "--triton DIR, --ovms DIR or --flat DIR")
@pytest.mark.advice("cli/package.py:_targets", "give each a folder of its own")
@pytest.mark.advice("cli/report.py:_write_again", "next: python3 -m webbrowser")
def test_the_next_commands_after_a_deployment(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    user.runs(advised(user.next(f"{DEPLOY} --device cpu --engine onnxruntime --engine openvino -o a.srd")))
    user.runs(user.next("inspect a.srd"))
    card = Path("a.srd/README.md").read_text()
    user.printed += card
    for command in re.findall(r"^srdeploy .*$", card, re.MULTILINE):
        user.runs(advised(command) + (" --force" if "upscale" in command else ""))
    user.refused("package a.srd")
    user.refused("package a.srd --triton b --flat b")
    user.runs(user.next("package a.srd --triton b --ovms c --flat d"))
    browse = user.next("report a.srd -o page")
    browser = Path("browser")
    browser.write_text('#!/bin/sh\necho "$1" > shown\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser.resolve()} %s")
    subprocess.run(shlex.split(browse), check=True)

    shown = Path("shown").read_text().strip()
    assert shown.startswith("file://")
    assert "<html" in Path(shown.removeprefix("file://")).read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.advice("cli/verify.py:_check", "name a folder with --images, --hr or both")
@pytest.mark.advice("cli/verify.py:_check", "give ground truth with --hr, or use --min-fidelity")
def test_options_of_verify(user: User) -> None:
    verify = "verify good.onnx --against good.pt"

    user.refused(verify)
    user.refused(f"{verify} --images photos --max-psnr-drop 1")
    user.runs(f"{verify} --hr photos --max-psnr-drop 1 --limit 1")
    user.runs(f"{verify} --images photos --min-fidelity 40 --limit 1")


@pytest.mark.advice("cli/upscale.py:_paths", "srdeploy upscale MODEL SOURCE -o OUTPUT")
@pytest.mark.advice("cli/upscale.py:command", "next: srdeploy upscale --status")
@pytest.mark.advice("cli/upscale_status.py:show_status", "more (--json lists all)")
def test_a_folder_in_shards(user: User) -> None:
    Path("many").mkdir()
    for number in range(50):
        photo(8, 8, number).save(f"many/{number}.png")

    user.refused("upscale good.onnx")
    status = user.next("upscale good.onnx many -o out --shard 1/2")
    assert "more (--json lists all)" in user.runs(status)
    assert len(json.loads(user.runs(f"{status} --json"))["left"]) > 20


@pytest.mark.advice("cli/upscale.py:_refuse", "remove --codec")
def test_options_that_do_not_apply(user: User) -> None:
    user.refused("upscale good.onnx photos -o out --codec ffv1")
    user.runs("upscale good.onnx photos -o out")


@pytest.mark.advice("cli/pipeline/engines.py:checked_placements", "a name that ends in .srd")
@pytest.mark.advice(
    "cli/pipeline/engines.py:checked_placements", "remove --compute-capability, or add --engine tensorrt-rtx"
)
@pytest.mark.advice("cli/pipeline/engines.py:_placements", "add --device cpu, or choose another engine")
@pytest.mark.advice("cli/pipeline/engines.py:_devices", "remove --device auto")
@pytest.mark.advice("cli/pipeline/engines.py:_default_placements", "to see what this machine lacks: srdeploy doctor")
def test_options_of_deploy(user: User) -> None:
    """The deployment above has the advised --device cpu."""
    fitting = f"{DEPLOY} --engine onnxruntime"

    user.refused(f"{fitting} -o bundle")
    user.refused(f"{fitting} --compute-capability 8.9 -o a.srd")
    user.refused(f"{fitting} --device cuda -o a.srd")
    user.refused(f"{fitting} --device auto --device cpu -o a.srd")
    message = user.refused(f"{DEPLOY} --device cuda -o a.srd")
    user.runs(message.rpartition(": ")[2])


@pytest.mark.advice("cli/pipeline/engines.py:_default_placements", "install one with: pip install 'srdeploy[cpu]'")
@pytest.mark.advice("cli/doctor.py:command", "no engine can run here: install one with: pip install 'srdeploy[cpu]'")
def test_no_engine_is_installed(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_extras.py runs pip on the extra."""
    with monkeypatch.context() as patch:
        for module in ("onnxruntime", "openvino", "ncnn", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
            patch.setitem(sys.modules, module, None)
        user.refused(f"{DEPLOY} -o a.srd")
        user.types("doctor")
    assert "no engine can run here" not in user.runs("doctor")


@pytest.mark.advice("cli/pipeline/opening.py:open_candidates", "name the checkpoint that it was made from")
def test_another_checkpoint(user: User) -> None:
    user.refused("verify good.onnx --against luma.pt --images photo.png")
    user.runs(CHECK)


@pytest.mark.advice("cli/pipeline/verify.py:side_within", "allow more with --memory")
def test_a_memory_budget_below_one_picture(user: User) -> None:
    needed = re.search(r"at least ([\d.]+) (\w+)", user.refused(f"{CHECK} --memory 1KiB"))
    assert needed is not None

    user.runs(f"{CHECK} --memory {needed[1]}{needed[2]}")


@pytest.mark.advice("cli/cache.py:verify", "remove them with: srdeploy cache gc")
@pytest.mark.advice("cli/cache.py:_key", "an engine built by srdeploy build")
def test_damaged_engines_in_the_cache(user: User) -> None:
    user.runs("build good.onnx --engine onnxruntime -o a.engine")
    document = json.loads(Path("a.engine.json").read_text())
    user.runs("cache explain a.engine")
    for path in Path(os.environ["SRDEPLOY_CACHE_DIR"]).rglob("*"):
        if path.is_file() and path.suffix not in (".json", ".lock"):
            path.chmod(0o600)
            path.write_bytes(b"damaged")

    message = user.refused("cache verify")
    user.runs(message[message.index("srdeploy cache gc") :])
    user.runs("cache verify")
    del document["details"]["key"]
    Path("a.engine.json").write_text(json.dumps(document))
    user.refused("cache explain a.engine")


# ----------------------------------------------------------------------------------------------------------------------
# The demo and the doctor


@pytest.mark.advice("cli/demo.py:examples_folder", "or name its folder with --examples")
@pytest.mark.advice("cli/demo.py:command", "choose another name, or pass --force to replace it")
@pytest.mark.advice("cli/doctor.py:command", "next: srdeploy demo")
def test_the_demo_without_its_examples(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advised clone has the folder, and a target `demo` in its Makefile; tests/cli/test_demo.py runs the demo."""
    Path("there").mkdir()

    with monkeypatch.context() as patch, pytest.raises(CapabilityError, match="make demo"):
        patch.setattr(demo, "__file__", str(user.folder / "site-packages" / "srdeploy" / "cli" / "demo.py"))
        demo.examples_folder(None)
    assert "\ndemo:" in (ROOT / "Makefile").read_text()
    assert user.next("doctor") == "srdeploy demo"
    user.refused("demo -o there")
    assert demo.examples_folder(ROOT / "examples").is_dir()


# ----------------------------------------------------------------------------------------------------------------------
# Reports


@pytest.mark.advice("cli/report.py:_write_again", "name one with -o, or use --compare with two reports")
@pytest.mark.advice("cli/report.py:_compare", "raise --max-fidelity-loss to allow it")
@pytest.mark.advice("cli/report.py:_compare", "its page has the details: srdeploy report")
def test_reports(user: User) -> None:
    user.runs(f"{CHECK} --report before")
    user.runs(f"{CHECK} --report after")
    document = json.loads(Path("after/report.json").read_text())
    (line,) = document["engines"]
    line["fidelity_min_db"] = 30.0
    Path("after/report.json").write_text(json.dumps(document))

    user.refused("report before")
    user.runs("report before -o page")
    user.refused("report --compare before after")
    user.runs("report --compare before after --max-fidelity-loss 200")
    document["engines"] = []
    Path("after/report.json").write_text(json.dumps(document))
    message = user.refused("report --compare before after")
    user.runs(message[message.index("srdeploy report") :].replace("FOLDER", "page2"))


@pytest.mark.advice("cli/pipeline/entries.py:measured_entry", "measured only; verify it with: srdeploy verify")
def test_an_engine_that_was_measured_only(user: User) -> None:
    user.runs(f"bench good.onnx --against good.pt --shape 1x3x16x16 {BRIEF['bench']} --report page")
    user.printed += Path("page/report.json").read_text()

    user.runs(CHECK)


@pytest.mark.advice("cli/verify.py:_refuse_failures", "export it again: srdeploy export CHECKPOINT -o model.onnx")
@pytest.mark.advice("cli/verify.py:_refuse_failures", "leave that layer float: srdeploy quantize --keep ")
def test_a_node_that_differs(user: User) -> None:
    changed_weights(lambda weights: weights * 1.5, layer=3)
    verify = "--against good.pt --images photo.png"

    message = user.refused(f"verify changed.onnx {verify} --bisect")
    command = message[message.index("srdeploy export") :]
    user.runs(command.replace("CHECKPOINT", "good.pt"))
    user.runs(f"verify model.onnx {verify}")
    message = user.refused(f"verify int8.onnx {verify} --min-fidelity 100 --bisect")
    keep = message[message.index("--keep") :]
    user.runs(f"quantize good.onnx --precision int8 --images photos {SMALL} {keep} -o kept.onnx")


# ----------------------------------------------------------------------------------------------------------------------
# Examples of --help


def examples() -> list[str]:
    """Return every command at the end of a --help, its lines joined."""
    found = []
    for name in VERBS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for each in [command, *getattr(command, "commands", {}).values()]:
            text = (each.epilog or "").replace("\\\n", " ")
            found += [" ".join(line.split()) for line in text.splitlines() if line.strip().startswith("srdeploy ")]
    return list(dict.fromkeys(found))


def network_of(files: Path, name: str) -> Path:
    """Return the small file that stands for a file of an example."""
    if name.endswith((".pt", ".tar")):
        return files / "good.pt"
    if name.endswith(".onnx"):
        return files / ("int8.onnx" if "int8" in name else "fp16.onnx" if "fp16" in name else "good.onnx")
    return files / ("photo.png" if name.endswith((".png", ".jpg")) else "photos")


def test_every_example_of_a_help_text_parses(user: User) -> None:
    """Those that read files find them; what they do is run above, and by tests/test_readme.py."""
    for example in examples():
        words = shlex.split(example)[1:]
        group = cli.get_command(click.Context(cli), words[0])
        assert group is not None
        command, rest = (group.commands[words[1]], words[2:]) if isinstance(group, click.Group) else (group, words[1:])
        for word in rest:
            if not word.startswith("-") and not Path(word).exists():
                source = network_of(user.folder, word)
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                Path(word).symlink_to(source)
        command.make_context(words[0], list(rest))
