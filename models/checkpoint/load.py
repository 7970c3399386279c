"""Load a checkpoint of any known dialect: file -> tensors -> dialect -> configuration -> canonical network.

load_checkpoint --reader--> named tensors --recognise--> dialect --resolve--> configuration --build--> network
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import package_versions
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.precision import Precision
from srdeploy.core.progress import SILENT, Progress
from srdeploy.models.checkpoint.folding import Folded, fold
from srdeploy.models.checkpoint.reader import RawCheckpoint, StateDict, read_checkpoint
from srdeploy.models.checkpoint.recognise import Recognised, build_network, check_geometry, is_network, recognise
from srdeploy.models.checkpoint.resolve import Decision, Ranked, Resolved, resolve, with_values
from srdeploy.models.choices import Choices
from srdeploy.models.dialects.base import AnsweredBy, Hints
from srdeploy.models.networks.rcan import RcanConfig
from srdeploy.models.networks.spec import ModelSpec, NetworkConfig, config_to_json, network_of, spec_of

__all__ = ["Choices", "Evidence", "Examined", "LoadedCheckpoint", "examine_checkpoint", "load_checkpoint"]

_MAX_NEIGHBOR_BYTES = 1 << 20


@dataclass(frozen=True)
class Evidence:
    """How a checkpoint was understood.

    Attributes:
        dialect: short name of the family.
        title: what people call it.
        source: where its code lives.
        container: kind of file.
        wrapper_path: keys that lead to the weights inside the file.
        hyperparameters: configuration field to the key and shape that it was read from.
        decisions: what the tensors leave open, with the answers and their reasons.
        ranking: combinations of candidates that were run on real images, best first.
        notes: what a user should know, one sentence each.
    """

    dialect: str
    title: str
    source: str
    container: str
    wrapper_path: tuple[str, ...]
    hyperparameters: Mapping[str, str]
    decisions: tuple[Decision, ...]
    ranking: tuple[Ranked, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def assumptions(self) -> tuple[Decision, ...]:
        """The decisions that rest on nothing but the source's defaults, where public files are known to differ."""
        return tuple(decision for decision in self.decisions if decision.by == "default" and decision.contested)

    def to_json(self) -> dict[str, Any]:
        """Return the evidence as JSON values."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was understood, with its network.

    Attributes:
        path: the file.
        sha256: of the file's bytes.
        dialect: short name of the family.
        config: everything that decides the arithmetic, except the tensors.
        spec: what follows from it for the outside.
        network: canonical network, evaluation mode, float32, in its own value range (0..1 or 0..255).
        evidence: what was found, assumed or resolved, and why.
    """

    path: Path
    sha256: str
    dialect: str
    config: NetworkConfig
    spec: ModelSpec
    network: nn.Module
    evidence: Evidence

    @property
    def reference(self) -> nn.Module:
        """The network on the outside contract: (N, C, H, W) in 0..1 to 0..1, not clamped. Shares the weights."""
        return Reference(self.network, self.spec.value_range).eval()

    def contract(self, precision: Precision = Precision.FP32) -> ModelContract:
        """Return what the outside may rely on when this network is exported."""
        spec = self.spec
        return ModelContract(
            architecture=spec.architecture,
            configuration=config_to_json(self.config),
            scale=spec.scale,
            colours=spec.colours,
            precision=precision,
            receptive_radius=spec.receptive_radius,
            macs_per_pixel=spec.macs_per_pixel,
            largest_tensor_per_pixel=spec.largest_tensor_per_pixel,
            checkpoint_sha256=self.sha256,
            trim=spec.trim,
            min_size=spec.min_size,
            provenance={
                "checkpoint": {"name": self.path.name, **self.evidence.to_json()},
                "versions": package_versions(("srdeploy", "torch")),
            },
        )


class Reference(nn.Module):
    """A network between 0..1 and 0..1: (N, C, H, W) float to (N, C, H', W') float, not clamped."""

    def __init__(self, network: nn.Module, value_range: float) -> None:
        super().__init__()
        self.network = network
        self.value_range = value_range

    def forward(self, image: Tensor) -> Tensor:
        """Return network(image * value_range) / value_range."""
        if self.value_range == 1.0:
            return self.network(image)  # type: ignore[no-any-return]
        return self.network(image * self.value_range) / self.value_range  # type: ignore[no-any-return]


def load_checkpoint(
    path: Path,
    choices: Choices = Choices(),  # noqa: B008 - frozen
    *,
    probe_images: Sequence[Path] = (),
    progress: Progress = SILENT,
) -> LoadedCheckpoint:
    """Load a checkpoint of any known dialect, or refuse it with evidence.

    Args:
        path: the file; reading it runs no code.
        choices: the user's answers to what the tensors leave open.
        probe_images: images on which remaining candidates are run.
        progress: where the work is reported.

    Raises:
        InputError: the file is no checkpoint, or of no known dialect, or incomplete, or its tensors leave a question
            open that has no answer.
        UsageError: a choice contradicts the file.
    """
    examined = examine_checkpoint(path, choices, probe_images=probe_images, progress=progress, strict=True)
    network = build_network(examined.config, examined.tensors)
    return LoadedCheckpoint(
        path=path,
        sha256=examined.raw.sha256,
        dialect=examined.evidence.dialect,
        config=examined.config,
        spec=spec_of(examined.config),
        network=network,
        evidence=examined.evidence,
    )


@dataclass(frozen=True)
class Examined:
    """A checkpoint that was read and recognised; unless it was examined strictly, questions may be open.

    Attributes:
        raw: the content of the file.
        weights: label of the network in `raw.alternatives` that was examined.
        config: with every open question at some candidate.
        tensors: by canonical name.
        evidence: what was found, assumed, resolved or left open.
    """

    raw: RawCheckpoint
    weights: str
    config: NetworkConfig
    tensors: dict[str, Tensor]
    evidence: Evidence


def examine_checkpoint(
    path: Path,
    choices: Choices = Choices(),  # noqa: B008 - frozen
    *,
    probe_images: Sequence[Path] = (),
    progress: Progress = SILENT,
    strict: bool = False,
) -> Examined:
    """Read and recognise a checkpoint without building its network.

    Args:
        path, choices, probe_images, progress: as for `load_checkpoint`.
        strict: refuse a file with an unanswered question, instead of listing it as open.

    Raises:
        InputError, UsageError: as for `load_checkpoint`.
    """
    with progress.task(f"reading {path.name}"):
        raw = read_checkpoint(path, is_network)
        label, weights = _weights(raw, choices, strict=strict)
        state = raw.alternatives[label]
        folded = _folded(path, state.tensors)
        recognised = _recognised(path, folded.tensors, _hints(raw, path))
    resolved = _resolved(path, recognised, choices, probe_images, progress, strict)
    config, tensors = _in_rgb(resolved, recognised.tensors)
    attributes = {name: module.attributes for name, module in state.modules.items()}
    compared = _compared(path, recognised, config, attributes) if attributes else 0
    evidence = Evidence(
        dialect=recognised.dialect.name,
        title=recognised.dialect.title,
        source=recognised.dialect.source,
        container=raw.container,
        wrapper_path=state.path,
        hyperparameters=recognised.sources,
        decisions=(weights, *resolved.decisions) if weights else resolved.decisions,
        ranking=resolved.ranking,
        notes=_notes(raw, state, folded, recognised, compared),
    )
    return Examined(raw, label, config, tensors, evidence)


def _weights(raw: RawCheckpoint, choices: Choices, *, strict: bool) -> tuple[str, Decision | None]:
    """Choose among the networks in a file; one that holds a single network leaves nothing to decide.

    Returns:
        The label of the network, and how it was chosen (None: there is one).
    """
    present = tuple(raw.alternatives)
    unexplained = raw.alternatives[raw.weights].unexplained
    by: AnsweredBy = "default"
    if choices.weights is not None:
        label = next((each for each in present if choices.weights in (each, _keys_of(raw, each))), None)
        if label is None:
            raise UsageError(
                f"--weights {choices.weights}: {raw.path} holds no such weights", expected=" or ".join(present)
            )
        by, reason = "flag", f"--weights {choices.weights}"
    elif len(present) == 1 and not unexplained:
        return present[0], None
    elif len(present) == 1:
        label, by = present[0], "open"
        reason = (
            f"{', '.join(unexplained)} beside it may be part of the network; state --weights {_keys_of(raw, label)}"
        )
        if strict:
            raise InputError(
                f"{raw.path} holds a network at {_keys_of(raw, label)} beside {', '.join(unexplained)}",
                expected="nothing beside it but losses, metrics and counters",
                next_step=f"if they do not change its output, pass --weights {_keys_of(raw, label)}",
            )
    elif set(present) == {"raw", "ema"}:
        label = "raw"
        reason = "the trainers' own code loads these; --weights ema takes the moving average, a different network"
    else:
        label, by = present[0], "open"
        reason = f"state --weights {' or '.join(present)}"
        if strict:
            raise InputError(
                f"{raw.path} holds several networks: {', '.join(_described(raw, each) for each in present)}",
                expected="one, or a choice",
                next_step=f"pass --weights {' or --weights '.join(present)}",
            )
    value = None if by == "open" else label
    return label, Decision("weights", (), "which of the networks in the file", value, by, reason, present)


def _keys_of(raw: RawCheckpoint, label: str) -> str:
    """Return the keys that lead to a network, joined as --weights takes them."""
    return "/".join(raw.alternatives[label].path)


def _described(raw: RawCheckpoint, label: str) -> str:
    keys = _keys_of(raw, label)
    return label if keys in (label, "") else f"{label} (at {keys})"


def _folded(path: Path, tensors: Mapping[str, Tensor]) -> Folded:
    try:
        return fold(tensors)
    except InputError as error:
        raise _of_file(path, error) from error


def _recognised(path: Path, tensors: Mapping[str, Tensor], hints: Hints) -> Recognised:
    try:
        return recognise(tensors, hints)
    except InputError as error:
        raise _of_file(path, error) from error


def _resolved(
    path: Path,
    recognised: Recognised,
    choices: Choices,
    probe_images: Sequence[Path],
    progress: Progress,
    strict: bool,
) -> Resolved:
    reading = recognised.reading

    def rank(combinations: Sequence[dict[str, Any]]) -> list[Ranked]:
        from srdeploy.models.checkpoint.probe import rank_candidates  # image decoding, which most loads do without

        def network(values: dict[str, Any]) -> nn.Module:
            config = with_values(reading.config, reading.questions, values)
            return Reference(build_network(config, recognised.tensors), config.value_range).eval()

        return rank_candidates(combinations, network, spec_of(reading.config), probe_images, progress)

    try:
        return resolve(
            reading.config,
            reading.questions,
            choices,
            recognised.dialect.title,
            rank if probe_images else None,
            strict=strict,
        )
    except InputError as error:
        raise _of_file(path, error) from error


def _hints(raw: RawCheckpoint, path: Path) -> Hints:
    return Hints(
        file_name=path.name,
        members=frozenset(raw.hints.keys),
        metadata=raw.metadata,
        neighbor=_neighbor(path),
    )


def _neighbor(path: Path) -> dict[str, Any]:
    """Read the config.json that some publishers put beside the weights; {} when there is none or it is no such file."""
    neighbor = path.with_name("config.json")
    try:
        # Opening anything but a regular file might wait forever.
        if not neighbor.is_file() or neighbor.stat().st_size > _MAX_NEIGHBOR_BYTES:
            return {}
        document = json.loads(neighbor.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _in_rgb(resolved: Resolved, tensors: dict[str, Tensor]) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Reorder the image channels of a network that was trained on BGR, so that it takes and returns RGB."""
    config = resolved.config
    if resolved.value("colours") != "bgr":
        return config, tensors
    if isinstance(config, RcanConfig) and config.mean is not None:
        config = replace(config, mean=config.mean[::-1], std=config.std and config.std[::-1])
    reversed_order = [2, 1, 0]
    changed = dict(tensors)
    first = tensors["first.weight"]
    per_colour = first.shape[1] // 3  # a pixel unshuffle turns each colour into adjacent channels
    order = [colour * per_colour + part for colour in reversed_order for part in range(per_colour)]
    changed["first.weight"] = first[:, order].contiguous()
    for name in ("last.weight", "last.bias", "sub_mean.bias", "add_mean.bias"):
        if name in tensors:
            changed[name] = tensors[name][reversed_order].contiguous()
    for name in ("sub_mean.weight", "add_mean.weight"):
        if name in tensors:
            changed[name] = tensors[name][reversed_order][:, reversed_order].contiguous()
    return config, changed


def _compared(
    path: Path, recognised: Recognised, config: NetworkConfig, attributes: Mapping[str, Mapping[str, Any]]
) -> int:
    with torch.device("meta"):
        network = network_of(config)
    try:
        return check_geometry(network, recognised.dialect, config, attributes)
    except InputError as error:
        raise _of_file(path, error) from error


def _of_file(path: Path, error: InputError) -> InputError:
    """Return an error of the recognition with the file's name in front."""
    return InputError(f"{path}: {error.found}", expected=error.expected, next_step=error.next_step)


def _notes(
    raw: RawCheckpoint, state: StateDict, folded: Folded, recognised: Recognised, compared: int
) -> tuple[str, ...]:
    notes = [*recognised.reading.notes, *raw.notes]
    if state.prefix:
        notes.append(f"the prefix {state.prefix} of all names was stripped")
    if state.unexplained:
        notes.append(f"{', '.join(state.unexplained)} beside the network were not read")
    if state.arrays:
        notes.append(f"{state.arrays} tensors are stored as NumPy arrays")
    for kind, count in folded.kinds.items():
        notes.append(f"{kind} of {count} weights was folded into them")
    if recognised.converted:
        notes.append(f"{recognised.converted} tensors are stored in another type and were converted to float32")
    if compared:
        notes.append(f"the pickled network's own stride and padding of {compared} convolutions agree with the family's")
    return tuple(notes)
