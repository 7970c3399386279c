"""The search for a quantized graph that keeps a bound in dB: `choose` decides, `evaluate` measures graphs."""
