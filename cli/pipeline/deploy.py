"""`deploy`: checkpoint, ONNX, FP16 and INT8, engines, verification, latency, report, bundle, in one run.

Each stage calls the function behind the verb of its name; their files land in one folder.

    types.py       options, candidates, outcome
    engines.py     which engines are built
    make.py        load, export, calibrate, compress, quantize, build
    verify.py      comparison with the eager network
    measure.py     latency next to the eager network
    finish.py      report, reproduce.sh, manifest
"""

from srdeploy.cli.pipeline.engines import checked_placements
from srdeploy.cli.pipeline.finish import finish
from srdeploy.cli.pipeline.make import build_all, calibrate, compress_graph, export, load, quantize_all
from srdeploy.cli.pipeline.measure import measure_engines
from srdeploy.cli.pipeline.types import DeployOptions, Outcome, Work
from srdeploy.cli.pipeline.verify import verify_engines
from srdeploy.core.artifact import atomic_folder
from srdeploy.core.progress import Progress
from srdeploy.runtime.bench.turns import Effort


def deploy(options: DeployOptions, progress: Progress, *, effort: Effort | None = None) -> Outcome:
    """Run all stages and write the bundle.

    Args:
        options: what is deployed, and how.
        progress: where the work is reported.
        effort: how long engines are measured; None for the default.

    Raises:
        InputError: the checkpoint or the images are not understood.
        ExportError: the FP32 graph could not be made, or does not agree with the network.
        CapabilityError: a requested engine cannot be made here, or the bundle cannot be written.
        UsageError: the bundle exists already, an engine is unknown, or options do not fit together.
    """
    placements = checked_placements(options)
    with atomic_folder(options.output, force=options.force, known_by="manifest.json") as folder:
        work = Work(options, folder, progress)
        with work.stage("load") as report:
            checkpoint = load(work, report)
        # Before the export, which takes longer: images that cannot be used should be known soon.
        with work.stage("calibrate") as report:
            calibration = calibrate(work, checkpoint, report)
        with work.stage("export") as report:
            export(work, checkpoint, report)
        if options.compress:
            with work.stage("compress") as report:
                compress_graph(work, placements, calibration, report)
        with work.stage("quantize") as report:
            candidates = quantize_all(work, placements, checkpoint.contract(), calibration, report)
        with work.stage("build") as report:
            candidates = build_all(work, candidates, checkpoint, report)
        with work.stage("verify") as report:
            verdicts = verify_engines(work, candidates, checkpoint, calibration, report)
        with work.stage("bench") as report:
            benches = measure_engines(work, verdicts.runnable(candidates), checkpoint, effort, report)
        with work.stage("report") as report:
            return finish(work, candidates, checkpoint, calibration, verdicts, benches, report)
