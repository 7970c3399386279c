"""What `compress` records about a graph, in sentence parts for people."""

from collections.abc import Mapping
from typing import Any


def summary(compression: Mapping[str, Any]) -> str:
    """Return what a compressed graph is and lost, from `ModelContract.compression`."""
    quality = compression["quality"]
    lost = f"{quality['drop_db']:.4f} dB lost"
    if quality.get("worst_drop_db") is not None:
        lost += f" (worst image {quality['worst_drop_db']:.4f} dB)"
    kind = "test" if quality.get("tested") else "held-out"
    return (
        f"another network than the trained one: {compression['fewer_macs']:.2f}x fewer multiply-adds, {lost} on "
        f"{quality['images']} {kind} images"
    )


def change_label(entry: Mapping[str, Any]) -> str:
    """Return what was done to a layer, from an entry of `compression["layers"]`."""
    rank, width = entry["rank"], f"{entry['of']} " if "of" in entry else ""
    if entry["kind"] == "inputs":
        return f"reads {rank} mixtures of its {width}input channels"
    if entry["kind"] == "outputs":
        return f"computes {rank} mixtures of its {width}output channels"
    return f"{rank} of its {width}output channels are left, {entry['reader']} is fitted to them"
