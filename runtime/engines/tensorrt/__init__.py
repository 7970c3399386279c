"""TensorRT and TensorRT-RTX: one strongly typed build, proof of what was built, opening and running.

`products` states what differs between the two, `families` is what the registry uses.
"""
