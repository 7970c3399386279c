"""README.md of a bundle: a model card that model hubs and people read, written from the report alone.

It has no date and no path of the machine, so equal reports give equal cards. A figure that was not measured is a dash.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from srdeploy.cli.console import markdown_table
from srdeploy.core.compression import summary
from srdeploy.runtime.bundle import CARD, SUFFIX
from srdeploy.runtime.report.labels import change_label, db_label, median_label, ratio_label, size_label
from srdeploy.runtime.signature import SIGNATURE

_NAMES = {"rcan": "RCAN", "srdensenet": "SRDenseNet"}
_STATUS = {"passed": "passed", "not-run": "built, not run here", "left-out": "excluded"}
_TAGS = {"openvino": "openvino", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt"}
"""Tags for engine families that hubs know by a name of their own."""

_LICENSES = "https://huggingface.co/docs/hub/repositories-licenses"


def model_card(document: Mapping[str, Any]) -> str:
    """Return the Markdown text of a bundle's card, with the metadata that hubs read as YAML front matter.

    Args:
        document: the bundle's report, as `srdeploy.runtime.report.document.report_document` returns it.
    """
    model = document["model"]
    name = document["title"].removesuffix(SUFFIX)
    architecture = _NAMES.get(model["architecture"], model["architecture"])
    colors = "RGB images" if model["colours"] == "rgb" else "the Y channel of BT.601"
    return "\n".join(
        [
            *_front_matter(document),
            f"# {name}",
            "",
            f"{architecture}, super-resolution x{model['scale']} of {colors}, deployed by srdeploy "
            f"{document['environment'].get('versions', {}).get('srdeploy', '')}".rstrip()
            + f" from the checkpoint `{model['checkpoint'].get('name', '-')}`.",
            "",
            *_compression(document),
            *_use(document),
            *_figures(document),
            *_verify(document),
            "## License",
            "",
            "Not stated yet. The weights are those of the checkpoint, and its license holds for them. Add the line "
            f"`license: NAME` to the metadata at the top of this file ([names]({_LICENSES})) and replace this "
            f"paragraph: {CARD} is the only file of a bundle that may be edited.",
            "",
        ]
    )


def _front_matter(document: Mapping[str, Any]) -> list[str]:
    model = document["model"]
    families = [line["engine"] for line in document["engines"] if line["file"] is not None]
    tags = ["super-resolution", "image-upscaling", model["architecture"], "onnx"]
    tags += sorted({_TAGS[family] for family in families if family in _TAGS})
    return [
        "---",
        f"# license: add one of {_LICENSES}",
        "library_name: srdeploy",
        "pipeline_tag: image-to-image",
        "tags:",
        *(f"  - {tag}" for tag in tags),
        "---",
        "",
    ]


def _compression(document: Mapping[str, Any]) -> list[str]:
    compression = document["model"]["provenance"].get("compression")
    return [] if compression is None else [f"It is compressed, {summary(compression)}.", ""]


def _use(document: Mapping[str, Any]) -> list[str]:
    channels = 3 if document["model"]["colours"] == "rgb" else 1
    return [
        "## Use",
        "",
        "```sh",
        f"srdeploy upscale {shlex.quote(document['title'])} photo.png -o photo_upscaled.png",
        "```",
        "",
        f"The ONNX files run in other programs too. Input `input`: (N, {channels}, H, W), float32 in 0..1; output "
        f"`output`: the same at x{document['model']['scale']}, not clamped. N, H and W are dynamic.",
        "",
    ]


def _figures(document: Mapping[str, Any]) -> list[str]:
    lines = document["engines"]
    verdicts = {entry["name"]: entry for entry in document["verification"]}
    rows = [_row(line, verdicts.get(line["name"])) for line in lines]
    headers = ["engine", "file", "size", "status", "fidelity", "Y PSNR change", "speed-up", "median"]
    used = [index for index in range(len(headers)) if any(row[index] != "–" for row in rows)]
    table = markdown_table([headers[index] for index in used], [[row[index] for index in used] for row in rows])
    return ["## Figures", "", table, "", *_conditions(document), ""]


def _row(line: Mapping[str, Any], verdict: Mapping[str, Any] | None) -> list[str]:
    latency = line["latency"].get("end-to-end")
    return [
        line["name"],
        "–" if line["file"] is None else f"`{line['file']}`",
        size_label(line["size_bytes"]),
        _STATUS.get(line["status"], line["status"]),
        db_label(line["fidelity_min_db"]),
        "–" if verdict is None else change_label(line["psnr_drop_db"]),
        ratio_label(latency),
        median_label(latency),
    ]


def _conditions(document: Mapping[str, Any]) -> list[str]:
    """Return what the figures mean and where they were measured."""
    verdicts: Sequence[Mapping[str, Any]] = document["verification"]
    sentences = []
    if verdicts:
        count = len(verdicts[0]["images"])
        reference = verdicts[0]["reference_quality"]
        images = f"the lowest of {count} images" if count > 1 else "on one image"
        sentences.append(
            f"Fidelity: PSNR between the outputs of the engine and of the eager FP32 PyTorch network, {images}. "
            "A `graph` line is an ONNX file verified on ONNX Runtime."
        )
        if reference is not None:
            sentences.append(
                f"Y PSNR change: against high-resolution originals; the network itself reaches "
                f"{reference['psnr_y_db']:.2f} dB on these images."
            )
    if document["bench"]:
        shapes = ", ".join(dict.fromkeys(bench["shape"] for bench in document["bench"]))
        sentences.append(f"Speed-ups (over eager FP32 PyTorch, with 95 % intervals) and medians: at {shapes}.")
    machine = document["environment"]
    flags = [flag for flag in machine["cpu_flags"] if flag in ("avx512_vnni", "avx_vnni", "avx512_bf16")]
    parts = [machine["processor"], f"{machine['cpus']} cores", *flags, *(gpu["name"] for gpu in machine["gpus"])]
    if document["bench"]:
        threads = document["bench"][0]["rows"][0]["runner"]["threads"]
        parts += [] if threads is None else [f"{threads} {'threads' if threads > 1 else 'thread'}"]
    if verdicts or document["bench"]:
        sentences.append(f"Measured on {', '.join(parts)}.")
    sentences.append("`report/report.html` has more, with pictures.")
    return [" ".join(sentences)]


def _verify(document: Mapping[str, Any]) -> list[str]:
    title, checkpoint = shlex.quote(document["title"]), document["model"]["checkpoint"]
    engine = next((line["file"] for line in document["engines"] if line["status"] == "passed" and line["file"]), None)
    commands = ["# compares every file with manifest.json", f"srdeploy inspect {title}"]
    if engine is not None:
        against = shlex.quote(checkpoint.get("name", "CHECKPOINT"))
        commands += ["# measures again", f"srdeploy verify {title}/{engine} --against {against} --images DIR"]
    signature = f"model_signing verify key --public_key key.pub --signature {title}/{SIGNATURE} {title}"
    commands += [f"# if there is a {SIGNATURE}, and with its maker's public key", signature]
    return [
        "## Verify",
        "",
        "```sh",
        *commands,
        "```",
        "",
        f"SHA-256 of the checkpoint: `{checkpoint['sha256']}`. `reproduce.sh` has the commands that made these files.",
        "",
    ]
