"""Key layouts as data: one template per layer of the canonical networks, and the sizes that shapes determine.

Templates are filled with group, block, layer, step (all from 0), their counterparts from 1 (block1, layer1), the
counts (groups, blocks), and step2, step3 (index of a convolution in a sequence of 2 or 3 modules per step) with
after2, after3 (index of the last module of such a step).
"""

from dataclasses import astuple, dataclass
from typing import Any

from srdeploy.models.dialects.base import Survey
from srdeploy.models.networks.rcan import RcanConfig
from srdeploy.models.networks.srdensenet import Deconvolution, SrDenseNetConfig


def _filled(template: str, **values: int) -> str:
    step = values.get("step", 0)
    derived = {f"{name}1": value + 1 for name, value in values.items() if name in ("block", "layer", "step")}
    return template.format(
        **values, **derived, step2=2 * step, step3=3 * step, after2=2 * step + 1, after3=3 * step + 2
    )


def _check_counts(survey: Survey, outer: int, inner: int) -> None:
    """Refuse counts whose product the file cannot hold, before a network of that size is laid out."""
    if outer * inner > len(survey.tensors):
        raise survey.refuse(
            f"its names speak of {outer} x {inner} blocks and it holds {len(survey.tensors)} tensors",
            "every one of them in the file",
        )


@dataclass(frozen=True)
class RcanLayout:
    """Where RCAN's tensors lie. `group_end` and `residual_scale` exist in some files only."""

    first: str
    conv1: str
    conv2: str
    squeeze: str
    expand: str
    group_end: str
    body_end: str
    upsampler: str
    last: str
    residual_scale: str = ""

    def modules(self, config: RcanConfig) -> dict[str, str]:
        """Return the source's path of every module, by its canonical path."""
        counts = {"groups": config.groups, "blocks": config.blocks}
        names = {"first": self.first, "body_end": _filled(self.body_end, **counts), "last": self.last}
        if config.mean_shift == "matrix":
            names |= {"sub_mean": "sub_mean", "add_mean": "add_mean"}
        for group in range(config.groups):
            for block in range(config.blocks):
                at = f"groups.{group}.blocks.{block}."
                for canonical, template in self._block_parts(config):
                    names[at + canonical] = _filled(template, group=group, block=block, **counts)
            if config.group_convolution:
                names[f"groups.{group}.end"] = _filled(self.group_end, group=group, **counts)
        for step in range(len(config.upsampler)):
            names[f"upsampler.{step}.convolution"] = _filled(self.upsampler, step=step)
        return names

    def copies(self, config: RcanConfig) -> dict[str, str]:
        """Return no copies: no public RCAN shares tensors."""
        return {}

    def templates(self) -> tuple[str, ...]:
        """Return the templates of all module paths."""
        return tuple(filter(None, astuple(self)))

    def _block_parts(self, config: RcanConfig) -> list[tuple[str, str]]:
        parts = [("conv1", self.conv1), ("conv2", self.conv2)]
        parts += [("gate.squeeze", self.squeeze), ("gate.expand", self.expand)]
        if config.residual_scale is None:
            parts.append(("residual_scale", self.residual_scale))
        return parts

    def sizes(self, survey: Survey) -> dict[str, Any]:
        """Read the configuration fields that follow from shapes alone."""
        groups = survey.count("groups", lambda index: _filled(self.conv1, group=index, block=0) + ".weight")
        blocks = survey.count("blocks", lambda index: _filled(self.conv1, group=0, block=index) + ".weight")
        _check_counts(survey, groups, blocks)
        features = survey.size("features", self.first + ".weight", 0)
        channels = survey.size("channels", self.last + ".weight", 0)
        if channels not in (1, 3):
            raise survey.refuse(f"it makes images of {channels} channels", "1 (Y) or 3 (RGB)")
        squeeze = _filled(self.squeeze, group=0, block=0) + ".weight"
        upsampler = survey.shuffle_factors(lambda step: _filled(self.upsampler, step=step) + ".weight", features)
        scale = 1
        for factor in upsampler:
            scale *= factor
        survey.sources["scale"] = survey.sources["upsampler"]
        return {
            "scale": scale,
            "groups": groups,
            "blocks": blocks,
            "features": features,
            # The width is stored; the "reduction" of the papers is not (22 features / 8 is 2, read back as 11).
            "attention_width": survey.size("attention_width", squeeze, 0),
            "channels": channels,
            "upsampler": upsampler,
        }


@dataclass(frozen=True)
class SrDenseNetLayout:
    """Where SRDenseNet's tensors lie; templates of layers that a family does not have are empty."""

    first: str
    layer: str
    last: str
    upsampler: str
    bottleneck: str = ""
    first_activation: str = ""
    block_activation: str = ""
    upsampler_activation: str = ""
    norm: str = ""
    upsampler_norm: str = ""
    repeated_activation: str = ""

    def modules(self, config: SrDenseNetConfig) -> dict[str, str]:
        """Return the source's path of every module, by its canonical path."""
        names = {"first": self.first, "last": self.last}
        if config.bottleneck is not None:
            names["bottleneck"] = self.bottleneck
        if config.mean_shift == "matrix":
            names |= {"sub_mean": "sub_mean", "add_mean": "add_mean"}
        if self.first_activation:
            names["first_activation"] = self.first_activation
        for block in range(config.blocks):
            names[f"blocks.{block}.activation"] = _filled(self.block_activation, block=block, layer=0)
            for layer in range(config.layers):
                place = {"block": block, "layer": layer}
                names[f"blocks.{block}.layers.{layer}"] = _filled(self.layer, **place)
                names[f"blocks.{block}.norms.{layer}"] = _filled(self.norm, **place)
        for step in range(len(config.deconvolutions or config.pixel_shuffles)):
            names[f"upsampler.{step}.convolution"] = _filled(self.upsampler, step=step)
            names[f"upsampler.{step}.activation"] = _filled(self.upsampler_activation, step=step)
            names[f"upsampler.{step}.norm"] = _filled(self.upsampler_norm, step=step)
        return {canonical: source for canonical, source in names.items() if source}

    def copies(self, config: SrDenseNetConfig) -> dict[str, str]:
        """Return the keys under which a shared slope is stored again."""
        if not self.repeated_activation or config.activation != "prelu":
            return {}
        return {
            _filled(self.repeated_activation, block=block, layer=layer) + ".weight": "blocks.0.activation.weight"
            for block in range(config.blocks)
            for layer in range(config.layers)
        }

    def templates(self) -> tuple[str, ...]:
        """Return the templates of all module paths."""
        return tuple(filter(None, astuple(self)))

    def sizes(self, survey: Survey) -> dict[str, Any]:
        """Read the configuration fields that follow from shapes alone."""
        blocks = survey.count("blocks", lambda index: _filled(self.layer, block=index, layer=0) + ".weight")
        layers = survey.count("layers", lambda index: _filled(self.layer, block=0, layer=index) + ".weight")
        _check_counts(survey, blocks, layers)
        sizes: dict[str, Any] = {
            "blocks": blocks,
            "layers": layers,
            "growth": survey.size("growth", _filled(self.layer, block=0, layer=0) + ".weight", 0),
            "low_level": survey.size("low_level", self.first + ".weight", 0),
            "channels": survey.size("channels", self.last + ".weight", 0),
            "bottleneck": survey.size("bottleneck", self.bottleneck + ".weight", 0) if self.bottleneck else None,
        }
        if sizes["channels"] not in (1, 3):
            raise survey.refuse(f"it makes images of {sizes['channels']} channels", "1 (Y) or 3 (RGB)")
        return sizes

    def kernels(self, survey: Survey) -> list[int]:
        """Return the kernel size of each deconvolution; all are square."""
        kernels = []
        for step in range(survey.steps(lambda index: _filled(self.upsampler, step=index) + ".weight")):
            key = _filled(self.upsampler, step=step) + ".weight"
            shape = survey.shape(key, 4)
            if shape[2] != shape[3]:
                raise survey.refuse(f"{key} has a kernel of {shape[2]}x{shape[3]}", "a square one")
            kernels.append(shape[2])
            survey.sources["deconvolutions"] = f"{key} {'x'.join(map(str, shape))}"
        return kernels

    def doubling(self, survey: Survey, geometry: Deconvolution) -> dict[str, Any]:
        """Read upsampling by equal deconvolutions whose geometry belongs to the family.

        Raises:
            InputError: there is none, or a kernel has another size.
        """
        kernels = self.kernels(survey)
        if not kernels or set(kernels) != {geometry.kernel}:
            raise survey.refuse(f"its deconvolutions have kernels {kernels}", f"{geometry.kernel} each")
        upsampled = survey.size("upsampled", _filled(self.upsampler, step=0) + ".weight", 1)
        return {"deconvolutions": (geometry,) * len(kernels), "upsampled": upsampled}
