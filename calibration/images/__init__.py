"""From people's pictures to a calibration set: sources, sampling of crops, the set itself."""
