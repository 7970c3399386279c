"""Images, folders and videos of any size through an engine: the Python API.

from srdeploy.upscale import Upscaler
"""

from typing import TYPE_CHECKING

from srdeploy.core.lazy import lazy_names

if TYPE_CHECKING:
    from srdeploy.upscale.budget import TileSettings
    from srdeploy.upscale.folders import FolderReport, upscale_folder
    from srdeploy.upscale.image_report import ImageReport
    from srdeploy.upscale.image_writer import write_image
    from srdeploy.upscale.single_image import OutputOptions, upscale_file
    from srdeploy.upscale.upscaler import Upscaler
    from srdeploy.upscale.video.job import VideoOptions, VideoReport, upscale_video

__all__ = [
    "FolderReport",
    "ImageReport",
    "OutputOptions",
    "TileSettings",
    "Upscaler",
    "VideoOptions",
    "VideoReport",
    "upscale_file",
    "upscale_folder",
    "upscale_video",
    "write_image",
]

__getattr__ = lazy_names(
    __name__,
    {
        "budget": ("TileSettings",),
        "folders": ("FolderReport", "upscale_folder"),
        "image_report": ("ImageReport",),
        "image_writer": ("write_image",),
        "single_image": ("OutputOptions", "upscale_file"),
        "upscaler": ("Upscaler",),
        "video.job": ("VideoOptions", "VideoReport", "upscale_video"),
    },
)
