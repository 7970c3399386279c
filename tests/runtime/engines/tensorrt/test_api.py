"""Every TensorRT name that the code uses exists in TensorRT 10.16, 11.4 and TensorRT-RTX.

The names are collected from the syntax tree: chains that begin with `trt`, and attributes of variables whose names
stand for TensorRT objects throughout. `rtx.py` needs them in TensorRT-RTX only, `full.py` in 10 and 11
only, all others in all three.

The full TensorRT libraries are gigabytes and need a GPU; their bindings are small and import over an empty library,
which is enough to ask whether a name exists. Every version is asked in a process of its own.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
SOURCES = sorted((ROOT / "runtime" / "engines" / "tensorrt").glob("*.py"))
BINDINGS = ROOT / "build" / "tensorrt-bindings"
VERSIONS = {"10.16.1.11": "10", "11.4.0.106": "11"}

RECEIVERS = {
    # variable name (or attribute name behind self) -> TensorRT class
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "trt_profile": "IOptimizationProfile",
    "parser_error": "ParserError",
    "timings": "ITimingCache",
    "cache": "IRuntimeCache",
    "runtime": "Runtime",
    "cuda_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
    "inspector": "EngineInspector",
    "host_memory": "IHostMemory",
}

STUB = """
#define S(n) void *n(void) { return 0; }
S(createInferBuilder_INTERNAL) S(createInferRefitter_INTERNAL) S(createInferRuntime_INTERNAL)
S(createNvOnnxParser_INTERNAL) S(createNvOnnxParserRefitter_INTERNAL)
S(getBuilderPluginRegistry) S(getPluginRegistry)
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void *logger, const char *space) { return 0; }
"""

ASK = """
import functools, importlib, json, sys
trt = importlib.import_module(sys.argv[1])
missing = []
for name in json.load(sys.stdin):
    try:
        functools.reduce(getattr, name.split("."), trt)
    except AttributeError:
        missing.append(name)
print(json.dumps({"version": trt.__version__, "missing": missing}))
"""


def names_used(source: str) -> set[str]:
    """Return the TensorRT names in a module's source, such as "BuilderFlag.TF32" or "Builder.create_network"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            chain = _chain(node)
            if chain is None:
                continue
            holders = [name.removeprefix("_") for name in chain]
            if "trt" in holders:
                names = [name for name in chain[holders.index("trt") + 1 :] if not name.startswith("__")]
                found.update({".".join(names)} if names else ())
            for holder, name in zip(holders, chain[1:], strict=False):
                if holder in RECEIVERS and not name.startswith("_"):
                    found.add(f"{RECEIVERS[holder]}.{name}")
    return found


def _chain(node: ast.expr) -> list[str] | None:
    """Return a.b.c as ["a", "b", "c"]; None when the chain does not begin with a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before = _chain(node.value)
        return None if before is None else [*before, node.attr]
    return None


def names_for(product: str) -> list[str]:
    """Return the names that one product ("rtx" or "full") must have."""
    other = "full.py" if product == "rtx" else "rtx.py"
    used = [names_used(path.read_text()) for path in SOURCES if path.name != other]
    return sorted(set.union(*used))


def ask(module: str, names: list[str], **environment: str) -> dict[str, object]:
    """Import bindings in a process of their own and return the names that they lack."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, module],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module", params=VERSIONS, ids=[f"tensorrt-{version}" for version in VERSIONS])
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the bindings of one release import."""
    version = request.param
    folder = BINDINGS / version
    if not (folder / "tensorrt_bindings").is_dir():
        pytest.skip(f"{folder} holds no bindings: make test downloads them")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the empty TensorRT library")
    stubs = tmp_path_factory.mktemp("stubs")
    for library, source in (("nvinfer", STUB), ("nvinfer_plugin", "int x_;"), ("nvonnxparser", "int x_;")):
        name = f"lib{library}.so.{VERSIONS[version]}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(stubs / name), "-x", "c", "-"]
        subprocess.run(command, input=source, text=True, check=True)
    return {"LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": str(folder), "VERSION": version}


def test_names_exist_in_full_tensorrt(full: dict[str, str]) -> None:
    answer = ask("tensorrt_bindings", names_for("full"), **full)

    assert answer == {"version": full["VERSION"], "missing": []}


def test_names_chosen_at_run_time_exist_in_full_tensorrt(full: dict[str, str]) -> None:
    from srdeploy.runtime.engines.tensorrt.full import COMPATIBILITY

    names = [f"HardwareCompatibilityLevel.{name}" for name in COMPATIBILITY.values()]

    assert ask("tensorrt_bindings", names, **full)["missing"] == []


def test_the_gate_sees_what_a_release_lacks(full: dict[str, str]) -> None:
    gone = ["BuilderFlag.FP16", "IInt8EntropyCalibrator2", "Builder.platform_has_fast_fp16"]
    rtx_only = ["ComputeCapability", "CudaGraphStrategy", "IBuilderConfig.set_compute_capability"]

    missing = ask("tensorrt_bindings", [*gone, *rtx_only, "Builder.no_such_thing"], **full)["missing"]

    removed = [] if full["VERSION"].startswith("10.") else gone
    assert missing == [*removed, *rtx_only, "Builder.no_such_thing"]


def test_names_exist_in_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'srdeploy[tensorrt-rtx]'")
    names = names_for("rtx")

    assert ask("tensorrt_rtx", names)["missing"] == []
    assert ask("tensorrt_rtx", ["BuilderFlag.FP16", "Builder.build_engine_with_config"])["missing"] == [
        "BuilderFlag.FP16",
        "Builder.build_engine_with_config",
    ]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("config.set_flag(trt.BuilderFlag.TF32)", {"IBuilderConfig.set_flag", "BuilderFlag.TF32", "BuilderFlag"}),
        ("plan.context.execute_async_v3(0)", {"IExecutionContext.execute_async_v3"}),
        ("self._cuda_engine.create_runtime_config()", {"ICudaEngine.create_runtime_config"}),
        ("self._trt.CudaGraphStrategy.DISABLED", {"CudaGraphStrategy.DISABLED", "CudaGraphStrategy"}),
        ("levels = trt.HardwareCompatibilityLevel.__members__", {"HardwareCompatibilityLevel"}),
        ("class A(trt.ILogger): pass", {"ILogger"}),
        ("config = {}; other.thing", set()),
    ],
    ids=["chain", "attribute", "private", "private-module", "members", "base-class", "nothing"],
)
def test_names_are_read_from_the_syntax_tree(source: str, names: set[str]) -> None:
    assert names_used(source) == names


def test_enough_names_are_found_to_mean_something() -> None:
    for product in ("rtx", "full"):
        names = names_for(product)
        assert len(names) > 35
        assert {"Builder.build_serialized_network", "IExecutionContext.execute_async_v3", "IProgressMonitor"} <= set(
            names
        )
