"""From an FP32 ONNX file and real images to typed FP16/BF16 and INT8/FP8 graphs."""
