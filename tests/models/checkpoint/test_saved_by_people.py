"""Checkpoints as training scripts leave them: one network is found, or the file is refused with a step that works."""

import collections
import datetime
import decimal
import enum
import functools
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_fuzzing.networks import assert_network, tree
from checkpoint_fuzzing.seeds import official_rcan, random_state, wxywhu_srdensenet, yjn870_srdensenet
from torch import Tensor, nn

from srdeploy.core.errors import InputError, UsageError
from srdeploy.models.checkpoint.load import examine_checkpoint, load_checkpoint
from srdeploy.models.choices import Choices

STATE = random_state(official_rcan())
OTHER = {name: value + 0.01 for name, value in STATE.items()}
THIRD = {name: value + 0.02 for name, value in STATE.items()}


def saved(folder: Path, document: Any) -> Path:
    torch.save(document, folder / "saved.ckpt")
    return folder / "saved.ckpt"


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Wrappers in names


def _inside(segment: str, depth: int) -> Callable[[str], str]:
    def rename(name: str) -> str:
        parts = name.split(".")
        return ".".join([*parts[:depth], segment, *parts[depth:]]) if len(parts) > depth + 1 else name

    return rename


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "segment",
    ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module", "_module"],
)
def test_wrappers_anywhere_in_a_name_are_taken_out(tmp_path: Path, segment: str, depth: int) -> None:
    rename = _inside(segment, depth)

    loaded = load_checkpoint(saved(tmp_path, {rename(name): value for name, value in STATE.items()}))

    assert_network(loaded, STATE)


@pytest.mark.parametrize("only", ["body.1", "body.0.body.1", "tail"])
def test_one_wrapped_part_of_a_network_is_enough(tmp_path: Path, only: str) -> None:
    renamed = {name.replace(only, f"{only}.module", 1) if name.startswith(f"{only}.") else name: name for name in STATE}

    loaded = load_checkpoint(saved(tmp_path, {new: STATE[old] for new, old in renamed.items()}))

    assert_network(loaded, STATE)


def test_several_wrappers_at_once_are_taken_out(tmp_path: Path) -> None:
    rename = _inside("_checkpoint_wrapped_module", 4)
    state = {f"module._orig_mod.{rename(name)}": value for name, value in STATE.items()}

    assert_network(load_checkpoint(saved(tmp_path, state)), STATE)


YJN870 = {
    "sf.weight": (4, 3, 3, 3),
    "sf.bias": (4,),
    **{
        f"rgs.0.module.{block}.module.{layer}.{leaf}": shape
        for block in range(2)
        for layer, leaf, shape in (
            ("0", "weight", (4, 4, 3, 3)),
            ("0", "bias", (4,)),
            ("2", "weight", (4, 4, 3, 3)),
            ("2", "bias", (4,)),
            ("3.module.1", "weight", (1, 4, 1, 1)),
            ("3.module.1", "bias", (1,)),
            ("3.module.3", "weight", (4, 1, 1, 1)),
            ("3.module.3", "bias", (4,)),
        )
    },
    "rgs.0.module.2.weight": (4, 4, 3, 3),
    "rgs.0.module.2.bias": (4,),
    "conv1.weight": (4, 4, 3, 3),
    "conv1.bias": (4,),
    "upscale.0.weight": (16, 4, 3, 3),
    "upscale.0.bias": (16,),
    "conv2.weight": (3, 4, 3, 3),
    "conv2.bias": (3,),
}


@pytest.mark.parametrize("rename", ["", "module.", "rgs."], ids=["as it is", "in front", "around the groups"])
def test_a_network_whose_own_parts_are_called_module_is_still_read(tmp_path: Path, rename: str) -> None:
    state = random_state(YJN870)
    if rename == "rgs.":
        changed = {name.replace("rgs.", "rgs.module.", 1): value for name, value in state.items()}
    else:
        changed = below(rename, state)

    loaded = load_checkpoint(saved(tmp_path, changed))

    assert loaded.evidence.dialect == "yjn870-rcan"
    assert_network(loaded, state)


# ----------------------------------------------------------------------------------------------------------------------
# Training modules


BESIDE = {
    "a loss": {"criterion.vgg.0.weight": torch.zeros(2, 2), "val_psnr.total": torch.zeros(())},
    "a discriminator": {"discriminator.net.0.weight": torch.zeros(2, 2), "discriminator.net.0.bias": torch.zeros(2)},
    "a discriminator of GAN codes": {"netD.head.0.weight": torch.zeros(2, 2), "netD.tail.weight": torch.zeros(2)},
    "a perceptual loss": {"perceptual_loss.features.0.weight": torch.zeros(2, 2)},
    "metrics": {"metrics.ssim.sum": torch.zeros(()), "lpips.lin0.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("prefix", ["model.", "generator.", "net.", "model._orig_mod.", "model.module.", "sr.model."])
@pytest.mark.parametrize("name", BESIDE)
def test_the_network_of_a_training_module_is_read_and_the_rest_listed(tmp_path: Path, name: str, prefix: str) -> None:
    document = {"epoch": 1, "pytorch-lightning_version": "2.5.0", "state_dict": below(prefix, STATE) | BESIDE[name]}

    examined = examine_checkpoint(saved(tmp_path, document), strict=True)
    loaded = load_checkpoint(tmp_path / "saved.ckpt")

    assert_network(loaded, STATE)
    state = examined.raw.alternatives[examined.weights]
    assert state.prefix.split(".")[0] == prefix.split(".")[0]
    assert any(part.startswith(next(iter(BESIDE[name])).split(".")[0]) for part in state.ignored)


def test_tensors_of_unknown_purpose_beside_a_network_are_not_dropped_in_silence(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": below("model.", STATE) | {"refine.weight": torch.zeros(3, 3, 3, 3)}})

    with pytest.raises(InputError, match=r"state_dict/model beside refine.weight.*pass --weights state_dict/model"):
        load_checkpoint(path)
    loaded = load_checkpoint(path, Choices(weights="state_dict/model"))

    assert_network(loaded, STATE)
    assert "refine.weight beside the network were not read" in loaded.evidence.notes
    assert [each.by for each in examine_checkpoint(path).evidence.decisions if each.choice == "weights"] == ["open"]


def test_counters_of_thop_are_ignored_and_listed(tmp_path: Path) -> None:
    modules = {""} | {name[:at] for name in STATE for at, letter in enumerate(name) if letter == "."}
    counters = {
        f"{module}.{counter}".lstrip("."): torch.zeros(1, dtype=torch.float64)
        for module in modules
        for counter in ("total_ops", "total_params")
    }

    examined = examine_checkpoint(saved(tmp_path, STATE | counters), strict=True)

    assert examined.raw.alternatives["raw"].ignored == (
        f"*.total_ops ({len(modules)})",
        f"*.total_params ({len(modules)})",
    )


# ----------------------------------------------------------------------------------------------------------------------
# Averages, and several networks in a file


def _parameters(state: dict[str, Tensor]) -> list[Tensor]:
    return list(state.values())


AVERAGED: dict[str, Any] = {
    "params_ema": {"params": STATE, "params_ema": OTHER},
    "torch AveragedModel": {
        "state_dict": STATE,
        "ema_state_dict": below("module.", OTHER) | {"n_averaged": torch.tensor(3)},
    },
    "ema-pytorch": {
        "state_dict": below("ema_model.", OTHER)
        | below("online_model.", STATE)
        | {"initted": torch.tensor(True), "step": torch.tensor(3)}
    },
    "ema-pytorch beside the model": {"model": STATE, "ema": below("ema_model.", OTHER) | {"step": torch.tensor(3)}},
    "ema-pytorch with both, beside": {
        "model": STATE,
        "ema": below("ema_model.", OTHER) | below("online_model.", STATE) | {"initted": torch.tensor(True)},
    },
    "LitEma": {
        "state_dict": below("model.", STATE)
        | {f"model_ema.{name.replace('.', '')}": value for name, value in OTHER.items()}
        | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(5)}
    },
    "torch_ema": {
        "model": STATE,
        "ema": {"decay": 0.995, "num_updates": 5, "shadow_params": _parameters(OTHER), "collected_params": None},
    },
    "Lightning WeightAveraging": {
        "state_dict": below("model.", OTHER),
        "current_model_state": below("model.", STATE),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "timm": {"state_dict": STATE, "state_dict_ema": OTHER},
    "MMEditing": {
        "meta": {"mmedit_version": "0.16"},
        "state_dict": below("generator.", STATE) | below("generator_ema.", OTHER) | {"step_counter": torch.zeros(1)},
    },
    "a prefix": {"state_dict": below("net.", STATE) | below("net_ema.", OTHER)},
}


@pytest.mark.parametrize("name", AVERAGED)
def test_raw_and_averaged_weights_are_told_apart(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, AVERAGED[name])

    raw, ema = load_checkpoint(path), load_checkpoint(path, Choices(weights="ema"))

    assert_network(raw, STATE)
    assert_network(ema, OTHER)
    assert raw.evidence.assumptions[0].choice == "weights"  # the plain weights are taken, and that is said aloud


def test_an_average_of_parameters_without_the_frozen_mean_shift_is_read(tmp_path: Path) -> None:
    mean = {"sub_mean.weight": torch.eye(3).view(3, 3, 1, 1), "sub_mean.bias": torch.full((3,), -114.0)}
    mean |= {"add_mean.weight": mean["sub_mean.weight"].clone(), "add_mean.bias": -mean["sub_mean.bias"]}
    document = {"model": {**mean, **STATE}, "ema": {"shadow_params": _parameters(OTHER)}}

    loaded = load_checkpoint(saved(tmp_path, document), Choices(weights="ema"))

    assert_network(loaded, {**mean, **OTHER})


def test_an_average_that_fits_no_network_is_mentioned(tmp_path: Path) -> None:
    document = {"model": STATE, "ema": {"shadow_params": _parameters(OTHER)[1:]}}

    loaded = load_checkpoint(saved(tmp_path, document))

    count = len(OTHER) - 1
    assert f"ema/shadow_params holds {count} averaged tensors without names, which fit no network here" in (
        loaded.evidence.notes
    )


SEVERAL: dict[str, tuple[Any, dict[str, dict[str, Tensor]]]] = {
    "the best one": ({"model": STATE, "best_model": OTHER}, {"raw": STATE, "best_model": OTHER}),
    "a stochastic average": ({"state_dict": STATE, "swa_state_dict": OTHER}, {"raw": STATE, "swa_state_dict": OTHER}),
    "three": (
        {"model": STATE, "model_ema": OTHER, "best_model": THIRD},
        {"raw": STATE, "ema": OTHER, "best_model": THIRD},
    ),
    "teacher and student": (
        {"state_dict": below("teacher.", STATE) | below("student.", OTHER)},
        {"state_dict/teacher": STATE, "state_dict/student": OTHER},
    ),
    "two of one kind": (
        {"state_dict": below("first_net.", STATE) | below("second_net.", OTHER)},
        {"state_dict/first_net": STATE, "state_dict/second_net": OTHER},
    ),
    "two averages": (
        {"model": STATE, "ema_fast": OTHER, "ema_slow": THIRD},
        {"raw": STATE, "ema_fast": OTHER, "ema_slow": THIRD},
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_networks_none_is_taken_in_silence(tmp_path: Path, name: str) -> None:
    document, networks = SEVERAL[name]
    path = saved(tmp_path, document)

    with pytest.raises(InputError, match="holds several networks") as caught:
        load_checkpoint(path)

    for label, expected in networks.items():
        assert f"--weights {label}" in str(caught.value)
        assert_network(load_checkpoint(path, Choices(weights=label)), expected)
    with pytest.raises(UsageError, match="holds no such weights; expected "):
        load_checkpoint(path, Choices(weights="nonsense"))


def test_equal_copies_are_one_network(tmp_path: Path) -> None:
    copy = {name: value.clone() for name, value in STATE.items()}

    loaded = load_checkpoint(saved(tmp_path, {"model": STATE, "best_model": copy}))

    assert_network(loaded, STATE)


def test_a_wrapper_of_any_name_is_opened(tmp_path: Path) -> None:
    document = {"weight": STATE, "epoch": 3, "iterations": 9, "opt_g": {"state": {0: {"exp_avg": torch.zeros(3)}}}}

    assert_network(load_checkpoint(saved(tmp_path, document)), STATE)


def test_pickled_networks_in_raw_and_averaged_form_are_told_apart(tmp_path: Path) -> None:
    raw, average = tree(official_rcan()).half(), tree(official_rcan()).half()
    path = saved(tmp_path, {"epoch": 1, "model": raw, "ema": average, "updates": 7, "optimizer": None})

    for label, network in (("raw", raw), ("ema", average)):
        expected = {name: value.float() for name, value in network.state_dict().items()}
        assert_network(load_checkpoint(path, Choices(weights=label)), expected)


def test_other_networks_beside_it_do_not_count(tmp_path: Path) -> None:
    document = {
        "model": STATE,
        "degradation": {"conv.weight": torch.zeros(2, 2), "conv.bias": torch.zeros(2)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }

    assert_network(load_checkpoint(saved(tmp_path, document)), STATE)


# ----------------------------------------------------------------------------------------------------------------------
# Values beside the weights


class Mode(enum.Enum):
    FAST = "fast"


class Options(types.SimpleNamespace):
    pass


VALUES: dict[str, Any] = {
    "partial": functools.partial(torch.optim.Adam, lr=1e-4),
    "deque": collections.deque([1.0], maxlen=5),
    "enumeration": Mode.FAST,
    "time zone": datetime.datetime.now(datetime.UTC),
    "namespace": types.SimpleNamespace(scale=2),
    "range": range(5),
    "slice": slice(0, 3),
    "complex": 1 + 2j,
    "decimal": decimal.Decimal("0.5"),
    "UUID": uuid.UUID(int=1 << 100),
    "counter": collections.Counter("aab"),
    "path": Path("/data"),
    "own class": Options(x=1),
    "function": torch.nn.functional.relu,
    "exception": ValueError("diverged"),
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "size": torch.Size((1, 2)),
    "generator state": np.random.default_rng(0),
    "array of objects": np.array(["a", None], dtype=object),
    "state of NumPy's generator": np.random.RandomState(0).get_state(),
    "optimizer": torch.optim.Adam([torch.zeros(1)]),
    "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.Adam([torch.zeros(1)]), 10),
    "dataset with a generator": torch.utils.data.TensorDataset(torch.zeros(1)),
    "large integer": 1 << 2000,
    "set of tuples": {(1, 2), (3, 4)},
    "keys of tuples": {(1, 2): 3},
    "complex tensor": torch.zeros(2, dtype=torch.complex64),
    "sparse tensor": torch.eye(3).to_sparse(),
    "8-bit float": torch.zeros(2).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", VALUES)
def test_values_beside_the_weights_refuse_no_file(tmp_path: Path, name: str, legacy: bool) -> None:
    path = tmp_path / "saved.ckpt"
    document = {"state_dict": STATE, "hyper_parameters": {"value": VALUES[name]}, "value": VALUES[name]}
    torch.save(document, path, _use_new_zipfile_serialization=not legacy)

    assert_network(load_checkpoint(path), STATE)


# ----------------------------------------------------------------------------------------------------------------------
# Weights whose values are elsewhere


FOREIGN: dict[str, tuple[dict[str, Tensor], str]] = {
    "LoRA": (STATE | {"head.0.lora_A.weight": torch.zeros(2, 27)}, r"low-rank adapters \(LoRA\)"),
    "QAT": (STATE | {"head.0.weight_fake_quant.scale": torch.ones(1)}, "the observers of quantization-aware training"),
    "QAT of distiller": (STATE | {"head.0.float_weight": torch.ones(1)}, "the observers of quantization-aware"),
    "quantized": (STATE | {"head.0.zero_point": torch.zeros(1)}, "quantized weights"),
    "FSDP": ({"_fsdp_wrapped_module._flat_param": torch.zeros(99)}, "flat parameters of FSDP"),
    "ZeRO-3": ({name: torch.zeros(0) for name in STATE}, "empty placeholders, as DeepSpeed ZeRO-3"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_weights_that_are_not_in_the_file_are_named(tmp_path: Path, name: str) -> None:
    state, found = FOREIGN[name]

    with pytest.raises(InputError, match=f"the checkpoint holds {found}"):
        load_checkpoint(saved(tmp_path, {"module": state}))


# ----------------------------------------------------------------------------------------------------------------------
# Pickled training modules


def test_a_pickled_training_module_is_searched_too(tmp_path: Path) -> None:
    outer = nn.Module()
    outer.model = tree(official_rcan())
    outer.criterion = nn.Linear(2, 2)
    path = saved(tmp_path, outer)

    loaded = load_checkpoint(path)

    assert_network(loaded, dict(outer.model.state_dict()))
    assert "agree with the family's" in " ".join(loaded.evidence.notes)


@pytest.mark.parametrize("shapes", [official_rcan, yjn870_srdensenet, wxywhu_srdensenet])
def test_all_families_are_found_in_a_training_module(tmp_path: Path, shapes: Callable[[], Any]) -> None:
    state = random_state(shapes())
    document = {"state_dict": below("model.", state) | {"loss.weight": torch.ones(1)}}

    assert_network(load_checkpoint(saved(tmp_path, document)), state)
