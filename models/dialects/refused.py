"""Families that are known, look like RCAN or SRDenseNet, and are something else: refused by name."""

from srdeploy.models.dialects.base import Refusal

_OFFICIAL = ("head.0.weight", "body.0.body.0.body.3.conv_du.0.weight")

REFUSED = (
    Refusal(
        title="HAN",
        # HAN holds every key of the official RCAN with the right shape: a loader that ignores leftovers would run
        # another network without complaint.
        signatures=((*_OFFICIAL, "last_conv.weight"), (*_OFFICIAL, "csa.gamma"), (*_OFFICIAL, "la.gamma")),
        reason="it adds layer and channel-spatial attention to RCAN, which is another network",
    ),
    Refusal(
        title="super-image's RCAN with BAM attention",
        signatures=(("body.0.body.0.body.3.ca.fc1.weight",),),
        reason="it replaces RCAN's channel gate by channel and spatial attention, which is another network",
    ),
    Refusal(
        title="ZFhuang's RCAN",
        signatures=(("rir_conv.weight", "input_conv.weight"), ("rir_conv.weight", "upsample.n1 conv.weight")),
        reason="it applies one stack of groups several times and upsamples with tanh, which is another network",
    ),
    Refusal(
        title="an SRDenseNet whose source is not public",
        signatures=(("dense_blocks.0.input.0.weight", "dense_blocks.0.layers.0.0.weight"),),
        reason="the places of its activations are only in its code",
    ),
    Refusal(
        title="EDSR",
        signatures=(("head.0.weight", "body.0.body.0.weight", "tail.1.weight"),),
        reason="srdeploy reads RCAN and SRDenseNet",
    ),
    Refusal(
        title="ESRGAN (RRDBNet)",
        signatures=(
            ("conv_first.weight", "body.0.rdb1.conv1.weight"),
            ("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"),
        ),
        reason="srdeploy reads RCAN and SRDenseNet",
    ),
    Refusal(
        title="SwinIR",
        signatures=(("conv_first.weight", "layers.0.residual_group.blocks.0.norm1.weight"),),
        reason="srdeploy reads RCAN and SRDenseNet",
    ),
)
