"""What to try when an engine misses its gate, by what went wrong."""

from srdeploy.core.environment import int8_weights_overflow
from srdeploy.core.precision import Precision
from srdeploy.runtime.verify.parity import VerifyResult

_BY_PRECISION = {
    Precision.FP32: "find the layer that differs: run the same command with --bisect",
    Precision.FP16: "quantize with --images that look like yours, which keeps layers with large activations in FP32, "
    "or with --precision bf16",
    Precision.BF16: "quantize with --precision fp16, whose mantissa has three more bits",
    Precision.INT8: "let srdeploy quantize --max-psnr-drop keep the sensitive layers in FP16 or FP32, or calibrate on "
    "more images that look like yours",
    Precision.FP8: "quantize with --precision int8 or fp16, or leave the first and last layers float with --keep",
}


def advice(result: VerifyResult) -> str:
    """Return the next step for an engine that failed, as a sentence part."""
    problems = [case.difference.problem or "" for case in (*result.images, *result.grid)]
    contract = result.candidate.contract
    precision = contract.precision
    if any("NaN" in problem or "infinite" in problem for problem in problems):
        if precision is Precision.FP16:
            return (
                "values leave FP16's range of 65504: quantize with --images, which keeps those layers in FP32, or with "
                "--precision bf16"
            )
        return "find where the values break: run the same command with --bisect"
    if any("output shape" in problem for problem in problems):
        return "the graph computes other sizes than the network: export it again"
    if all(case.passed for case in result.images) and any(not case.passed for case in result.grid):
        return "it is right on whole images and wrong on some shapes: a size was baked into the graph; export it again"
    if result.candidate.device == "cpu" and int8_weights_overflow(contract.weight_bits):
        return "this processor lacks VNNI, and sums of 8-bit weights overflow on it: quantize with --weight-bits 7"
    if precision is not Precision.FP32 and result.worst_case.difference.fidelity_db < 25.0:
        return (
            "this is too far off for rounding: the engine may compute this graph wrongly; run the same command with "
            "another --engine, and with --bisect to find the layer"
        )
    return _BY_PRECISION[precision]
