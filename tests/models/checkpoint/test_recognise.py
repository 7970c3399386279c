"""Files that are nearly right, or right for another network, are refused with evidence; nothing is ignored."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.load import load_checkpoint
from srdeploy.models.checkpoint.recognise import build_network, check_geometry, recognise, source_names
from srdeploy.models.dialects import DIALECTS
from srdeploy.models.dialects.base import Dialect, Hints
from srdeploy.models.dialects.lornatang_srdensenet import DIALECT as LORNATANG
from srdeploy.models.dialects.official_rcan import DIALECT as OFFICIAL
from srdeploy.models.dialects.yjn870_srdensenet import DIALECT as YJN870
from srdeploy.models.networks.rcan import RcanConfig
from srdeploy.models.networks.spec import NetworkConfig, network_of
from srdeploy.models.networks.srdensenet import Deconvolution, SrDenseNetConfig

RCAN = RcanConfig(scale=2, groups=2, blocks=2, features=8, attention_width=2, upsampler=(2,))
DENSE = SrDenseNetConfig(growth=4, layers=2, blocks=2, low_level=8, bottleneck=16, upsampled=16)
State = dict[str, Tensor]


def state_of(config: NetworkConfig, dialect: Dialect) -> State:
    """Return a random network's tensors under a dialect's names."""
    torch.manual_seed(0)
    tensors = network_of(config).state_dict()
    return {source: tensors[name] for name, source in source_names(dialect, config).items()}


def without(key: str) -> Callable[[State], None]:
    return lambda state: state.__delitem__(key)


def with_(key: str, *shape: int) -> Callable[[State], None]:
    return lambda state: state.__setitem__(key, torch.zeros(shape))


def renamed(old: str, new: str) -> Callable[[State], None]:
    return lambda state: state.__setitem__(new, state.pop(old))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            without("body.1.body.1.body.2.bias"),
            r"looks like the official RCAN layout, but 1 key \(body.1.body.1.body.2.bias\) is missing",
            id="one missing",
        ),
        pytest.param(
            without("body.0.body.0.body.0.weight"),
            "body.0.body.0.body.0.weight is missing and body.1.body.0.body.0.weight is there$",
            id="missing amid a sequence",
        ),
        pytest.param(
            with_("body.7.stray.weight", 3),
            r"looks like the official RCAN layout, but 1 key \(body.7.stray.weight\) is left over",
            id="one left over",
        ),
        pytest.param(
            renamed("body.2.weight", "body.9.weight"),
            r"1 key \(body.9.weight\) is left over and 1 key \(body.2.weight\) is missing",
            id="renamed",
        ),
        pytest.param(without("head.0.weight"), "looks like the official RCAN layout, but .*head.0.weight", id="head"),
        pytest.param(without("tail.1.weight"), "tail.1.weight", id="signature key"),
        pytest.param(with_("body.0.body.0.body.0.weight", 8, 8, 5, 5), "shape 8x8x5x5; expected 8x8x3x3", id="kernel"),
        pytest.param(with_("body.0.body.1.body.2.weight", 8, 9, 3, 3), "shape 8x9x3x3; expected 8x8x3x3", id="width"),
        pytest.param(with_("head.0.weight", 8, 3, 3), r"head.0.weight has shape \(8, 3, 3\)", id="axes"),
        pytest.param(with_("tail.0.0.weight", 30, 8, 3, 3), "makes 30 maps; expected 8 times the square", id="shuffle"),
        pytest.param(with_("tail.1.weight", 5, 8, 3, 3), "images of 5 channels", id="channels"),
        pytest.param(with_("body.0.body.0.body.3.conv_du.0.weight", 0, 8, 1, 1), "shape .0, 8, 1, 1", id="empty"),
    ],
)
def test_perturbed_official_files_are_refused(change: Callable[[State], None], message: str) -> None:
    state = state_of(RCAN, OFFICIAL)
    assert recognise(state, Hints()).dialect is OFFICIAL
    change(state)

    with pytest.raises(InputError, match=message):
        recognise(state, Hints())


@pytest.mark.parametrize("extra", ["last_conv.weight", "csa.gamma", "la.gamma"])
def test_han_is_refused_by_name_though_it_holds_every_key_of_rcan(extra: str) -> None:
    state = state_of(RCAN, OFFICIAL)
    state[extra] = torch.zeros(1)

    with pytest.raises(InputError, match="the checkpoint is HAN"):
        recognise(state, Hints())


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        pytest.param(
            ["head.0.weight", "tail.1.weight", "body.0.body.0.body.3.ca.fc1.weight", "body.0.body.0.body.0.weight"],
            "super-image's RCAN with BAM attention",
            id="bam",
        ),
        pytest.param(["input_conv.weight", "rir_conv.weight", "upsample.n1 conv.weight"], "ZFhuang's RCAN", id="zf"),
        pytest.param(
            ["dense_blocks.0.input.0.weight", "dense_blocks.0.layers.0.0.weight", "bottleneck.0.weight"],
            "whose source is not public",
            id="unidentified",
        ),
        pytest.param(["head.0.weight", "body.0.body.0.weight", "tail.1.weight"], "EDSR", id="edsr"),
        pytest.param(["conv_first.weight", "body.0.rdb1.conv1.weight"], "ESRGAN", id="esrgan"),
    ],
)
def test_known_strangers_are_refused_by_name(keys: list[str], name: str) -> None:
    with pytest.raises(InputError, match=name):
        recognise({key: torch.zeros(4, 4, 3, 3) for key in keys}, Hints())


def test_an_unknown_network_is_refused_with_its_names() -> None:
    with pytest.raises(InputError, match=r"2 tensors \(fc.weight, fc.bias, …\) are of no known network"):
        recognise({"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}, Hints())


def test_the_nearest_dialect_is_named_when_no_signature_fits() -> None:
    state = state_of(DENSE, YJN870)
    state["first.conv.weight"] = state.pop("conv.conv.weight")

    with pytest.raises(InputError, match=r"looks like yjn870 SRDenseNet, but 1 key \(first.conv.weight\) is left over"):
        recognise(state, Hints())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    state = state_of(RCAN, OFFICIAL)
    state["body.2.bias"][3] = value

    with pytest.raises(InputError, match="body.2.bias holds values that are not finite"):
        recognise(state, Hints())


def test_whole_numbers_are_refused_and_half_precision_is_converted() -> None:
    state = state_of(RCAN, OFFICIAL)
    halves = {key: tensor.half() for key, tensor in state.items()}
    state["body.2.bias"] = torch.zeros(8, dtype=torch.int8)

    recognised = recognise(halves, Hints())

    assert recognised.converted == len(halves)
    assert {tensor.dtype for tensor in recognised.tensors.values()} == {torch.float32}
    with pytest.raises(InputError, match="holds int8 values"):
        recognise(state, Hints())


def test_shared_slopes_must_be_shared() -> None:
    from srdeploy.models.dialects.rdst_srdensenet import DIALECT as RDST

    config = replace(
        DENSE,
        low_level=4,
        upsampled=16,
        deconvolutions=(),
        pixel_shuffles=(2,),
        layer_input="everything",
        first_activation=False,
        bottleneck_activation=False,
        upsampler_activation=False,
        activation="prelu",
        mean_shift="matrix",
        reconstruction_input="last",
    )
    state = state_of(config, RDST)
    for block in range(2):
        for layer in range(2):
            state[f"body.{block}.body.{layer}.body.1.weight"] = torch.tensor([0.25])
    assert recognise(state, Hints()).reading.config == config
    state["body.1.body.1.body.1.weight"] = torch.tensor([0.3])

    with pytest.raises(InputError, match=r"body.1.body.1.body.1.weight differs from body.0.body.0.body.1.weight"):
        recognise(state, Hints())


def test_joining_blocks_in_the_other_order_would_show() -> None:
    """Both orders load the same shapes, so only a comparison of outputs tells them apart."""
    config = replace(
        DENSE,
        block_order="new_first",
        bottleneck_activation=False,
        deconvolutions=(Deconvolution(2, 2), Deconvolution(2, 2)),
    )
    recognised = recognise(state_of(config, LORNATANG), Hints())
    image = torch.rand(1, 1, 6, 6)

    with torch.no_grad():
        right = build_network(recognised.reading.config, recognised.tensors)(image)
        wrong = build_network(replace(recognised.reading.config, block_order="old_first"), recognised.tensors)(image)

    assert recognised.reading.config == config
    assert (right - wrong).abs().max() > 1e-3


@settings(max_examples=60)
@given(data=st.data())
def test_no_key_is_ever_ignored(data: st.DataObject) -> None:
    """Removing, renaming or adding any single key of any small file is refused."""
    config, dialect = data.draw(st.sampled_from([(RCAN, OFFICIAL), (DENSE, YJN870)]))
    state = state_of(config, dialect)
    key = data.draw(st.sampled_from(sorted(state)))
    match data.draw(st.sampled_from(["remove", "rename", "add"])):
        case "remove":
            del state[key]
        case "rename":
            state[key + "_"] = state.pop(key)
        case _:
            state[key + data.draw(st.sampled_from([".weight", "2", ".0"]))] = torch.zeros(1)

    with pytest.raises(InputError):
        recognise(state, Hints())


def test_a_pickled_network_must_agree_about_its_geometry() -> None:
    recognised = recognise(state_of(DENSE, YJN870), Hints())
    network = build_network(DENSE, recognised.tensors)
    honest = {"deconv.0": {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1], "output_padding": [1, 1]}}
    other = {"deconv.2": {"stride": [2, 2], "output_padding": [0, 0]}}

    assert check_geometry(network, YJN870, DENSE, honest) == 1
    with pytest.raises(InputError, match=r"deconv.2 has output_padding \(0, 0\); expected \(1, 1\)"):
        check_geometry(network, YJN870, DENSE, other)


def test_signatures_do_not_overlap() -> None:
    """The first match wins, so no file of one family may carry the signature of an earlier one, beside its own."""
    for dialect in DIALECTS:
        keys = dict.fromkeys(dialect.signature)
        assert [other.name for other in DIALECTS if other.matches(keys)] == [dialect.name]
    assert len({dialect.name for dialect in DIALECTS}) == len(DIALECTS)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    state = state_of(RCAN, OFFICIAL)
    del state["body.2.bias"]
    torch.save(state, path)

    with pytest.raises(InputError, match=r"half.pth: looks like the official RCAN layout"):
        load_checkpoint(path)


def test_a_network_is_built_around_the_files_tensors() -> None:
    recognised = recognise(state_of(RCAN, OFFICIAL), Hints())

    network = build_network(recognised.reading.config, recognised.tensors)

    state = network.state_dict()
    assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in recognised.tensors.items())
    assert not network.training
    assert not any(values.requires_grad for values in network.parameters())
