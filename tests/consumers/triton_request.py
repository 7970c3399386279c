"""Ask a Triton server, in the environment that has its client: triton_request.py ADDRESS MODEL INPUTS.npz OUTPUTS.npz.

INPUTS.npz holds arrays by input name; a uint8 array named "encoded" is one encoded file. OUTPUTS.npz gets the answer.
An error of the server is printed as its message, with exit code 1.
"""

import sys

import numpy as np
import tritonclient.grpc as triton

address, model, source, target = sys.argv[1:]
inputs = []
for name, values in np.load(source).items():
    array = np.array([values.tobytes()], np.object_) if name == "encoded" else values
    tensor = triton.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype))
    inputs.append(tensor.set_data_from_numpy(array))
try:
    result = triton.InferenceServerClient(address).infer(model, inputs)
except triton.InferenceServerException as error:
    sys.exit(error.message())
answers = {entry.name: result.as_numpy(entry.name) for entry in result.get_response().outputs}
files = {name: np.frombuffer(array[0], np.uint8) for name, array in answers.items() if array.dtype == np.object_}
np.savez(target, **(answers | files))
