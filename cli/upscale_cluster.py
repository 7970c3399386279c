"""srdeploy upscale --ray: a folder or a video on a Ray cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from srdeploy.cli.console import RichProgress
from srdeploy.cli.upscale_options import UpscaleOptions, output_options, tile_settings, video_options
from srdeploy.cli.upscale_reports import folder_document, video_document

if TYPE_CHECKING:
    from srdeploy.upscale.scale.shards import Shard


def run_on_cluster(
    options: UpscaleOptions,
    model: Path,
    source: Path,
    output: Path,
    *,
    suffix: str | None,
    shard: "Shard | None",
    progress: RichProgress,
) -> dict[str, Any]:
    """Upscale a folder or a video on the cluster that the options name, and return the JSON document.

    Raises:
        UsageError: --device names one GPU of this machine.
        CapabilityError: there is no such cluster, or it lacks something.
    """
    from srdeploy.core.errors import UsageError
    from srdeploy.upscale.scale.cluster import choose_share, connected
    from srdeploy.upscale.scale.cluster_folder import upscale_folder_on_cluster
    from srdeploy.upscale.scale.cluster_video import upscale_video_on_cluster
    from srdeploy.upscale.scale.model_package import check_model, model_sha256
    from srdeploy.upscale.scale.worker import WorkerOptions

    if options.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {options.device} with --ray", expected="auto, cpu or cuda: Ray places the workers")
    assert options.ray is not None
    model = model.resolve()
    sha256 = model_sha256(model)
    check_model(model)
    opened = WorkerOptions(
        model=model,
        model_sha256=sha256,
        settings=tile_settings(options),
        engine=options.engine,
        precision=options.precision,
        fallback=None if options.fallback is None else options.fallback.resolve(),
        alpha=options.alpha,
    )
    with connected(options.ray) as ray:
        share = choose_share(ray, options.device, options.threads)
        progress.note(
            f"cluster at {options.ray}: {share.count} workers, each with {share.cpus:g} CPUs, {share.gpus} GPUs"
        )
        if not source.is_dir():
            video = upscale_video_on_cluster(
                ray,
                share,
                opened,
                source,
                output,
                video_options(options),
                mixed_engines=options.mixed_engines,
                progress=progress,
            )
            return video_document(video, output, progress)
        report = upscale_folder_on_cluster(
            ray,
            share,
            opened,
            source,
            output,
            output_options(options),
            suffix=suffix,
            shard=shard,
            mixed_engines=options.mixed_engines,
            progress=progress,
        )
        return folder_document(report, output, progress)
