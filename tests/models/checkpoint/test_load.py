"""Loaded checkpoints: outside contract, evidence, weights, channel order, neighbors, and no time wasted."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.precision import Precision
from srdeploy.models.checkpoint.load import Choices, examine_checkpoint, load_checkpoint
from srdeploy.models.checkpoint.recognise import source_names
from srdeploy.models.dialects import basicsr_rcan, official_rcan, rcan_it
from srdeploy.models.dialects.base import Dialect
from srdeploy.models.networks.rcan import Rcan, RcanConfig, rcan_x4

CONFIG = RcanConfig(scale=2, groups=1, blocks=2, features=4, attention_width=1, upsampler=(2,))


def state_of(config: RcanConfig = CONFIG, dialect: Dialect = official_rcan.DIALECT, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = Rcan(config).state_dict()
    return {source: state[name] for name, source in source_names(dialect, config).items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_reference_is_the_network_between_0_and_1(tmp_path: Path) -> None:
    loaded = load_checkpoint(saved(tmp_path / "net.pt", state_of()))
    image = torch.rand(1, 3, 5, 6)

    with torch.inference_mode():
        outside, inside = loaded.reference(image), loaded.network(image * 255) / 255

    assert loaded.spec.value_range == 255.0
    assert torch.equal(outside, inside)


def test_contract_carries_the_evidence_through_onnx_metadata(tmp_path: Path) -> None:
    loaded = load_checkpoint(saved(tmp_path / "net.pt", state_of()))

    contract = loaded.contract(Precision.FP16)
    again = ModelContract.from_metadata(contract.to_metadata(), name="test")

    assert again == contract
    assert again.precision is Precision.FP16
    assert again.checkpoint_sha256 == loaded.sha256
    checkpoint = again.provenance["checkpoint"]
    assert checkpoint["name"] == "net.pt"
    assert checkpoint["dialect"] == "official-rcan"
    assert checkpoint["decisions"][0]["choice"] == "value_range"
    assert checkpoint["hyperparameters"]["features"] == "head.0.weight 4x3x3x3, axis 0"


def test_assumptions_are_what_public_files_disagree_about(tmp_path: Path) -> None:
    loaded = load_checkpoint(saved(tmp_path / "net.pt", state_of()))

    assert [decision.choice for decision in loaded.evidence.assumptions] == ["value_range"]
    assert [decision.choice for decision in loaded.evidence.decisions] == ["value_range", "activation", "colours"]


def test_plain_and_averaged_weights(tmp_path: Path) -> None:
    config = replace(CONFIG, mean_shift="constant", mean=(0.4488, 0.4371, 0.4040))
    both = {name: state_of(config, basicsr_rcan.DIALECT, seed) for seed, name in enumerate(("params", "params_ema"))}
    path = saved(tmp_path / "both.pth", both)

    plain, average = load_checkpoint(path), load_checkpoint(path, Choices(weights="ema"))

    assert plain.evidence.decisions[0].value == "raw"
    assert plain.evidence.decisions[0] in plain.evidence.assumptions
    assert average.evidence.wrapper_path == ("params_ema",)
    assert torch.equal(average.network.state_dict()["first.weight"], both["params_ema"]["conv_first.weight"])
    with pytest.raises(UsageError, match="holds no such weights; expected raw"):
        load_checkpoint(saved(tmp_path / "one.pth", {"params": both["params"]}), Choices(weights="ema"))


@pytest.mark.parametrize("unshuffle", [1, 2])
@pytest.mark.parametrize("shift", ["matrix", "none"])
def test_a_network_trained_on_bgr_takes_rgb(tmp_path: Path, unshuffle: int, shift: Any) -> None:
    config = replace(CONFIG, unshuffle=unshuffle, upsampler=(2,) * unshuffle, mean_shift=shift, value_range=1.0)
    dialect = official_rcan.UNSHUFFLE if unshuffle > 1 else official_rcan.DIALECT
    state = state_of(config, dialect)
    if shift == "matrix":
        state["sub_mean.weight"] = torch.randn(3, 3, 1, 1)
        state["sub_mean.bias"] = torch.tensor([-0.3, -0.4, -0.5])
    path = saved(tmp_path / "net.pt", state)
    image = torch.rand(1, 3, 4, 6)

    plain, reordered = load_checkpoint(path), load_checkpoint(path, Choices(colours="bgr"))
    with torch.inference_mode():
        expected = plain.reference.double()(image.flip(1).double()).flip(1)
        output = reordered.reference.double()(image.double())

    assert torch.allclose(output, expected, atol=1e-12)
    assert not torch.allclose(output, plain.reference.double()(image.double()), atol=1e-3)


def test_a_constant_mean_is_reordered_too(tmp_path: Path) -> None:
    config = replace(CONFIG, mean_shift="constant", mean=(0.1, 0.2, 0.3))
    path = saved(tmp_path / "net.pth", state_of(config, basicsr_rcan.DIALECT))

    loaded = load_checkpoint(path, Choices(colours="bgr", mean=(0.1, 0.2, 0.3)))

    assert loaded.spec.mean == (0.3, 0.2, 0.1)


@pytest.mark.parametrize(
    ("neighbor", "name", "value", "by"),
    [
        pytest.param({"model_type": "RCAN"}, "weights.pt", 1.0, "wrapper", id="config.json of super-image"),
        pytest.param({"model_type": "EDSR"}, "weights.pt", 255.0, "default", id="another config.json"),
        pytest.param(None, "pytorch_model_4x.pt", 1.0, "wrapper", id="super-image's file name"),
        pytest.param("no JSON {", "weights.pt", 255.0, "default", id="a config.json that is no JSON"),
        pytest.param(["list"], "weights.pt", 255.0, "default", id="a config.json of another kind"),
    ],
)
def test_a_publishers_neighboring_file_is_a_hint(
    tmp_path: Path, neighbor: Any, name: str, value: float, by: str
) -> None:
    if neighbor is not None:
        text = neighbor if isinstance(neighbor, str) else json.dumps(neighbor)
        (tmp_path / "config.json").write_text(text)

    loaded = load_checkpoint(saved(tmp_path / name, state_of()))

    decision = loaded.evidence.decisions[0]
    assert (decision.choice, decision.value, decision.by) == ("value_range", value, by)


def test_a_neighbor_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")

    assert load_checkpoint(saved(tmp_path / "net.pt", state_of())).spec.value_range == 255.0


@pytest.mark.parametrize(
    ("bias", "value"), [pytest.param(-0.44, 1.0, id="0..1"), pytest.param(-114.0, 255.0, id="0..255")]
)
def test_the_stored_mean_tells_the_range(tmp_path: Path, bias: float, value: float) -> None:
    state = state_of()
    state["sub_mean.bias"] = torch.full((3,), bias)

    assert load_checkpoint(saved(tmp_path / "net.pt", state)).spec.value_range == value


def test_a_mean_that_tells_no_range_is_a_question(tmp_path: Path) -> None:
    state = state_of()
    state["sub_mean.bias"] = torch.zeros(3)
    path = saved(tmp_path / "net.pt", state)

    with pytest.raises(InputError, match="--value-range 255 or 1"):
        load_checkpoint(path)
    assert load_checkpoint(path, Choices(value_range=1.0)).spec.value_range == 1.0


def test_safetensors_metadata_is_believed_and_checked(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in state_of(replace(CONFIG, mean_shift="none")).items()}
    told = {"scale": 2, "n_feats": 4, "act_mode": "gelu", "norm": False}
    honest, lying = tmp_path / "honest.safetensors", tmp_path / "lying.safetensors"
    save_file(state, honest, metadata={"metadata": json.dumps(told)})
    save_file(state, lying, metadata={"metadata": json.dumps(told | {"n_feats": 64})})

    loaded = load_checkpoint(honest)

    assert isinstance(loaded.config, RcanConfig)
    assert loaded.config.activation == "gelu"
    assert loaded.evidence.container == "safetensors"
    with pytest.raises(InputError, match="metadata has n_feats 64 and its tensors have 4"):
        load_checkpoint(lying)
    with pytest.raises(UsageError, match="contradicts the file's metadata"):
        load_checkpoint(honest, Choices(activation="relu"))


def test_numbers_that_a_safetensors_header_holds_as_texts_are_numbers(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in state_of().items()}
    save_file(state, tmp_path / "net.safetensors", metadata={"format": "pt", "scale": "2", "rgb_range": "1.0"})

    loaded = load_checkpoint(tmp_path / "net.safetensors")

    assert loaded.spec.value_range == 1.0


def test_metadata_of_a_strange_kind_is_refused(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in state_of(replace(CONFIG, mean_shift="none")).items()}
    path = tmp_path / "strange.safetensors"
    for told in ({"act_mode": "swish2"}, {"act_mode": ["relu"]}, {"n_colors": "3"}):
        save_file(state, path, metadata={"metadata": json.dumps(told)})

        with pytest.raises(InputError, match="its metadata has"):
            load_checkpoint(path)


def test_rcan_it_is_refused_without_its_settings_and_examined_all_the_same(tmp_path: Path) -> None:
    config = replace(CONFIG, upsampler_activation="silu", residual_scale=0.1)
    path = saved(tmp_path / "model_best.pth.tar", {"state_dict": state_of(config, rcan_it.DIALECT), "iteration": 1})

    examined = examine_checkpoint(path)

    assert {each.choice for each in examined.evidence.decisions if each.by == "open"} == {"activation", "res_scale"}
    with pytest.raises(InputError, match="--activation relu or silu"):
        load_checkpoint(path)
    loaded = load_checkpoint(path, Choices(activation="silu", res_scale=0.1))
    assert isinstance(loaded.config, RcanConfig)
    assert loaded.config.attention_activation == loaded.config.upsampler_activation == "silu"


def test_loading_neither_initialises_weights_nor_imports_a_compiler(tmp_path: Path) -> None:
    """A full-size RCAN x4, in a fresh process: random initialisation would make the CPU time explode."""
    path = saved(tmp_path / "full.pt", {name: torch.full(shape, -114.0) for name, shape in full_shapes().items()})
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from srdeploy.models.checkpoint.load import load_checkpoint\n"
        "import torch\n"
        "calls = []\n"
        "torch.nn.init.kaiming_uniform_ = lambda *a, **k: calls.append(1)\n"
        f"loaded = load_checkpoint(Path({str(path)!r}))\n"
        "print(sum(p.numel() for p in loaded.network.parameters()), len(calls), 'torch._dynamo' in sys.modules)\n"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.split() == ["15592355", "0", "False"]


def full_shapes() -> dict[str, torch.Size]:
    from srdeploy.models.checkpoint.recognise import tensor_shapes

    shapes = tensor_shapes(rcan_x4())
    return {source: shapes[name] for name, source in source_names(official_rcan.DIALECT, rcan_x4()).items()}
