"""INT8 graphs: observed ranges, scales, rounding of weights, placement of Q/DQ nodes."""
