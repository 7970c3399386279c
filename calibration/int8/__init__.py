"""INT8 graphs: ranges, scales, rounding of weights, placement of Q/DQ nodes; `builder` puts them together."""
