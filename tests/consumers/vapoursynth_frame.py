"""Run examples/upscale.vpy on one picture, in the environment of VapourSynth.

vapoursynth_frame.py SCRIPT NETWORK PICTURE OUTPUT: pictures are .npy files, (H, W, 3) float32 RGB.
"""

import runpy
import sys

import numpy as np
import vapoursynth as vs

script, network, picture, output = sys.argv[1:]
pixels = np.load(picture)
height, width, _ = pixels.shape


def fill(n: int, f: vs.VideoFrame) -> vs.VideoFrame:
    frame = f.copy()
    for plane in range(3):
        np.asarray(frame[plane])[:] = pixels[..., plane]
    return frame


blank = vs.core.std.BlankClip(format=vs.RGBS, width=width, height=height, length=1)
runpy.run_path(script, init_globals={"video_in": blank.std.ModifyFrame(blank, fill), "network": network})
with vs.get_output(0).clip.get_frame(0) as frame:
    np.save(output, np.stack([np.asarray(frame[plane]) for plane in range(3)], axis=-1))
