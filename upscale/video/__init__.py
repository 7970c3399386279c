"""Videos: decoding, encoding, timestamps, resumable parts and muxing, around an `Upscaler`."""
