"""Every dialect against a second implementation of its source: random sizes, float64, written from the sources' facts.

The sources are plain functions in `checkpoint_fuzzing.references` that write checkpoints in their families' own key
layouts. Each file is loaded, and its network must compute the same.
"""

from pathlib import Path

import pytest
import torch
from checkpoint_fuzzing.references import CASES, Case, Sizes, Weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srdeploy.core.errors import InputError
from srdeploy.models.checkpoint.load import Choices, load_checkpoint
from srdeploy.models.checkpoint.recognise import build_network, recognise, source_names
from srdeploy.models.dialects import DIALECTS
from srdeploy.models.dialects.base import Hints

IDS = [f"{case.dialect}-{index}" for index, case in enumerate(CASES)]


@pytest.mark.parametrize("case", CASES, ids=IDS)
@settings(max_examples=5)
@given(data=st.data(), seed=st.integers(0, 2**20))
def test_a_loaded_file_computes_what_its_source_computes(
    tmp_path: Path, case: Case, data: st.DataObject, seed: int
) -> None:
    small = st.integers(1, 3)
    sizes = Sizes(
        scale=data.draw(st.sampled_from(case.scales), label="scale"),
        groups=data.draw(small),
        blocks=data.draw(small),
        features=data.draw(st.integers(2, 6)),
        width=data.draw(small),
        channels=data.draw(st.sampled_from(case.channels)),
        growth=data.draw(st.integers(1, 4)),
        layers=data.draw(small),
        low=data.draw(st.integers(1, 6)),
        bottleneck=data.draw(st.integers(2, 6)),
    )
    weights = Weights(seed)
    image = torch.rand(2, sizes.channels, 5, 6, generator=weights.generator).double()
    expected = case.run(weights, image, sizes)
    path = tmp_path / case.file_name
    torch.save(case.wrap(weights, sizes), path)

    loaded = load_checkpoint(path, Choices(**case.choices))
    with torch.inference_mode():
        output = loaded.reference.double()(image)

    assert loaded.dialect == case.dialect
    assert loaded.spec.scale == sizes.scale
    assert loaded.spec.trim == (sizes.scale - 1 if case.trim else 0)
    assert output.shape == expected.shape
    assert float((output - expected).abs().max()) <= 1e-9 * max(1.0, float(expected.abs().max()))
    structure = (
        (sizes.groups, sizes.blocks, sizes.features)
        if loaded.spec.architecture == "rcan"
        else (
            sizes.blocks,
            sizes.layers,
            sizes.growth,
        )
    )
    names = ("groups", "blocks", "features") if loaded.spec.architecture == "rcan" else ("blocks", "layers", "growth")
    assert tuple(getattr(loaded.config, name) for name in names) == structure


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_file_written_back_under_its_sources_names_is_the_same_network(tmp_path: Path, case: Case) -> None:
    """The canonical tensors, written under the dialect's names, load to the same configuration and tensors."""
    sizes = Sizes(case.scales[-1], 2, 1, 4, 2, case.channels[-1], 2, 2, 3, 4)
    weights = Weights(1)
    case.run(weights, torch.rand(1, sizes.channels, 5, 6).double(), sizes)
    first, second = tmp_path / case.file_name, tmp_path / "again" / case.file_name
    second.parent.mkdir()
    torch.save(case.wrap(weights, sizes), first)
    loaded = load_checkpoint(first, Choices(**case.choices))
    dialect = next(dialect for dialect in DIALECTS if dialect.name == case.dialect)
    tensors = loaded.network.state_dict()
    names = source_names(dialect, loaded.config)
    written = Weights(2)
    written.update({source: tensors[name] for name, source in names.items()})
    written.update({copy: tensors[name] for copy, name in dialect.layout.copies(loaded.config).items()})
    written.update({key: weights[key] for key in ("mean", "std") if key in weights})

    torch.save(case.wrap(written, sizes), second)
    again = load_checkpoint(second, Choices(**case.choices))

    assert again.config == loaded.config
    assert all(torch.equal(values, tensors[name]) for name, values in again.network.state_dict().items())
    assert set(weights) - set(written) <= {key for key in weights if key.endswith("num_batches_tracked")}


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_key_sets_end_in_success_or_a_documented_error(data: st.DataObject) -> None:
    """Shapes, types and names are changed at random; whatever is accepted must build a network."""
    case = data.draw(st.sampled_from(CASES))
    sizes = Sizes(case.scales[-1], 2, 1, 4, 2, case.channels[-1], 2, 2, 3, 4)
    weights = Weights(1)
    case.run(weights, torch.rand(1, sizes.channels, 5, 6).double(), sizes)
    state: dict[str, Tensor] = dict(weights)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(state)))
        shape = list(state[key].shape)
        match data.draw(st.sampled_from(["axis", "rank", "type", "drop", "index", "copy"])):
            case "axis" if shape:
                shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(st.integers(0, 9))
                state[key] = torch.zeros(shape)
            case "rank":
                state[key] = torch.zeros(shape[: data.draw(st.integers(0, 2))])
            case "type":
                kinds = [torch.int64, torch.bool, torch.complex64, torch.float16]
                state[key] = torch.ones(shape, dtype=data.draw(st.sampled_from(kinds)))
            case "drop" if len(state) > 1:
                del state[key]
            case "index":
                state[key.replace("0", data.draw(st.sampled_from(["1", "7", "x"])))] = state[key]
            case _:
                state[key + ".weight"] = state[key]

    try:
        recognised = recognise(state, Hints())
    except InputError:
        return

    build_network(recognised.reading.config, recognised.tensors)


def test_names_that_promise_more_than_the_file_holds_are_refused_at_once() -> None:
    """One thousand groups of one thousand blocks would be a million, named with two thousand keys."""
    state = {f"body.{index}.body.0.body.0.weight": torch.zeros(4, 4, 3, 3) for index in range(1000)}
    state |= {f"body.0.body.{index}.body.0.weight": torch.zeros(4, 4, 3, 3) for index in range(1000)}
    state |= dict.fromkeys(("head.0.weight", "tail.1.weight"), torch.zeros(4, 4, 3, 3))
    state["body.0.body.0.body.3.conv_du.0.weight"] = torch.zeros(1, 4, 1, 1)

    with pytest.raises(InputError, match="1000 x 1000 blocks"):
        recognise(state, Hints())


def test_every_dialect_has_a_reference() -> None:
    assert {dialect.name for dialect in DIALECTS} == {case.dialect for case in CASES} | {
        "native"
    }  # has tests of its own
