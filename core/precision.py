"""The numeric types a graph can be brought to; precision lives in the ONNX file and nowhere else."""

from enum import StrEnum


class Precision(StrEnum):
    """The type that the heavy layers of a graph compute in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


class Target(StrEnum):
    """The engine family that a quantized graph is laid out for: it decides the type and place of Q/DQ pairs."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    OPENVINO = "openvino"
    ONNXRUNTIME = "onnxruntime"


MIN_FIDELITY_DB: dict[Precision, float] = {
    # Minimum PSNR in dB between an engine's output and the eager FP32 network's, both on 0..1 (peak 1).
    Precision.FP32: 90.0,  # other summation orders cost about 1e-6 on 0..1, that is 120 dB; 90 leaves room for depth
    Precision.FP16: 60.0,  # 11 bits of mantissa through some hundred layers; a 38 dB network loses < 0.03 dB
    Precision.BF16: 45.0,  # 8 bits of mantissa
    Precision.INT8: 40.0,  # a floor only: INT8 is gated by its drop in dB (--max-psnr-drop)
    Precision.FP8: 40.0,
}
