"""Mutate checkpoints and load them: only success or one of srdeploy's own errors may come back.

    python tests/fuzz/fuzz_checkpoints.py --count 20000 --workers 2

Every case follows from its number and --seed alone; a failing one is run again with --only NUMBER, and its bytes are
kept in --keep. Limits per case: 5 s of processor time (a busy machine fails nothing) and 1 GB of memory beyond what the
program takes before it begins. Exit code 0 when every case met them, 1 otherwise.
"""

import argparse
import collections
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checkpoint_fuzzing.mutations import mutated
from checkpoint_fuzzing.seeds import seeds

from srdeploy.core.errors import SrdeployError
from srdeploy.models.checkpoint.load import load_checkpoint

SECONDS_PER_CASE = 5.0
BYTES_PER_CASE = 1 << 30

Result = dict[str, Any]


class TooSlow(BaseException):
    """A case ran into its time limit; a BaseException, so that no handler in between swallows it."""


def main() -> int:
    arguments = _arguments()
    if arguments.only is not None:
        return _run_one(arguments.seed, arguments.only, arguments.keep)
    if arguments.worker is not None:
        _work(arguments)
        return 0
    began = time.monotonic()
    results = _run_workers(arguments)
    failures = [result for result in results if result["outcome"].startswith("FAILED")]
    _print_summary(results, failures, time.monotonic() - began)
    return 1 if failures or len(results) < arguments.count else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="number of cases (default 20000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="run this case alone and show what happens")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-checkpoints")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# The parent: start workers, and notice one that dies


def _run_workers(arguments: argparse.Namespace) -> list[Result]:
    arguments.keep.mkdir(parents=True, exist_ok=True)
    shares = [_Share(arguments, worker) for worker in range(arguments.workers)]
    with ThreadPoolExecutor(arguments.workers) as pool:
        return [result for results in pool.map(_Share.results, shares) for result in results]


class _Share:
    """Every n-th case, in a process of its own that is started again after a crash."""

    def __init__(self, arguments: argparse.Namespace, worker: int) -> None:
        self._arguments = arguments
        self._worker = worker
        self._process = self._start(arguments.first + worker)

    def _start(self, first: int) -> "subprocess.Popen[str]":
        end = self._arguments.first + self._arguments.count
        command = [sys.executable, __file__, "--worker", str(self._worker), "--first", str(first)]
        command += ["--count", str(end - first), "--workers", str(self._arguments.workers)]
        command += ["--seed", str(self._arguments.seed), "--keep", str(self._arguments.keep)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def results(self) -> list[Result]:
        found: list[Result] = []
        while True:
            number = None
            assert self._process.stdout is not None
            for line in self._process.stdout:
                message = json.loads(line)
                number = message["number"]
                if "outcome" in message:
                    found.append(message)
            if self._process.wait() == 0:
                return found
            crash = f"FAILED: the process died with status {self._process.returncode}"
            found.append({"number": number, "outcome": crash, "seconds": 0.0, "name": "?", "growth": 0})
            end = self._arguments.first + self._arguments.count
            if number is None or number + self._arguments.workers >= end:
                return found
            self._process = self._start(number + self._arguments.workers)


# ----------------------------------------------------------------------------------------------------------------------
# A worker: run cases one after another


def _work(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("error")
    sources = list(seeds())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pth"
        path.write_bytes(sources[0][1])
        load_checkpoint(path)  # imports and caches are paid before the limit is set
        _limit_memory()
        for number in range(arguments.first, arguments.first + arguments.count, arguments.workers):
            name, data = case(sources, arguments.seed, number)
            path.write_bytes(data)
            print(json.dumps({"number": number}), flush=True)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            began = time.process_time()
            outcome = run_case(path)
            seconds = time.process_time() - began
            growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if outcome.startswith("FAILED"):
                (arguments.keep / f"case-{arguments.seed}-{number}").write_bytes(data)
            result = {"number": number, "name": name, "outcome": outcome, "seconds": seconds, "growth": growth}
            print(json.dumps(result), flush=True)


def case(sources: list[tuple[str, bytes]], seed: int, number: int) -> tuple[str, bytes]:
    """Return name and bytes of a case."""
    randomness = random.Random(f"{seed}:{number}")
    name, data = randomness.choice(sources)
    _, other = randomness.choice(sources)
    mutation, changed = mutated(data, other, randomness)
    return f"{name} {mutation}", changed


def run_case(path: Path) -> str:
    """Load one file and say what came of it: "loaded", "refused: ..." or "FAILED: ..."."""
    previous = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_CASE)
    try:
        load_checkpoint(path)
    except SrdeployError as error:
        text = str(error)
        if not text.isprintable():
            return f"FAILED: the message has control characters: {text!r}"
        if str(path) not in text:
            return f"FAILED: the message does not name the file: {text}"
        return f"refused: {text}"
    except TooSlow:
        return f"FAILED: took more than {SECONDS_PER_CASE} s of processor time"
    except MemoryError:
        return "FAILED: took more than 1 GB"
    except BaseException:
        return "FAILED: " + traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    return "loaded"


def _too_slow(number: int, frame: object) -> None:
    raise TooSlow


def _limit_memory() -> None:
    used = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmSize")
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES_PER_CASE, used + BYTES_PER_CASE))


def _run_one(seed: int, number: int, keep: Path) -> int:
    keep.mkdir(parents=True, exist_ok=True)
    path = keep / f"case-{seed}-{number}"
    name, data = case(list(seeds()), seed, number)
    path.write_bytes(data)
    outcome = run_case(path)
    print(f"{name}\n{path} ({len(data)} bytes)\n{outcome}")
    return 1 if outcome.startswith("FAILED") else 0


def _print_summary(results: list[Result], failures: list[Result], seconds: float) -> None:
    for failure in failures[:20]:
        print(f"case {failure['number']} ({failure['name']}): {failure['outcome']}", file=sys.stderr)
    kinds = collections.Counter(result["outcome"].partition(":")[0] for result in results)
    document = {
        "cases": len(results),
        **{kind: kinds[kind] for kind in ("loaded", "refused", "FAILED")},
        "seconds": round(seconds, 1),
        "slowest_case_s": round(max((result["seconds"] for result in results), default=0.0), 3),
        "largest_growth_mb": round(max((result["growth"] for result in results), default=0) / 1024, 1),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    sys.exit(main())
