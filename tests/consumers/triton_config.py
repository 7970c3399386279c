"""Parse Triton model configurations with Triton's own protobuf and print them as JSON: triton_config.py FILE..."""

import sys
from pathlib import Path

from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

for name in sys.argv[1:]:
    config = text_format.Parse(Path(name).read_text(), ModelConfig())
    print(json_format.MessageToJson(config, preserving_proto_field_name=True, indent=None))
