"""Python classes with the names and signatures of NVIDIA's real bindings, made when the tests run.

The bindings of TensorRT 10 and 11 import over a library without content, in a process of their own, and describe
themselves: pybind11 writes the types and names of every argument into docstrings. From these descriptions classes are
generated that refuse a wrong name, number, keyword or type of an argument as pybind11 does, and that have no other
attribute than the real ones. What they do is in `gpu_simulator.tensorrt`.
"""

import contextlib
import functools
import json
import math
import re
import shutil
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_simulator.cuda import ViolationError

ROOT = Path(__file__).parents[2]
BINDINGS = ROOT / "build" / "tensorrt-bindings"
VERSIONS = ("10.16.1.11", "11.4.0.106")
_STUB = """
#define S(n) void *n(void) { return 0; }
S(createInferBuilder_INTERNAL) S(createInferRefitter_INTERNAL) S(createInferRuntime_INTERNAL)
S(createNvOnnxParser_INTERNAL) S(createNvOnnxParserRefitter_INTERNAL)
S(getBuilderPluginRegistry) S(getPluginRegistry)
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void *logger, const char *space) { return 0; }
"""


class NotSimulatedError(AssertionError):
    """The code calls something real that the simulator lacks: add it to the simulator."""


# --------------------------------------------------------------------------------------------------- reading
def describe(module: Any) -> dict[str, Any]:
    """Return classes, enumerations, signatures and constants of real bindings as JSON values."""
    classes: dict[str, Any] = {}
    constants: dict[str, list[str]] = {}
    for name, value in vars(module).items():
        if isinstance(value, type) and value.__module__.startswith(module.__name__.split(".")[0]):
            classes[name] = _describe_class(value)
        elif isinstance(getattr(type(value), "__members__", None), Mapping):
            constants[name] = [type(value).__qualname__, value.name]
    functions = [name for name, value in vars(module).items() if isinstance(value, types.BuiltinFunctionType)]
    return {
        "name": module.__name__,
        "version": module.__version__,
        "classes": classes,
        "constants": constants,
        "functions": functions,
    }


def _describe_class(kind: type) -> dict[str, Any]:
    members = getattr(kind, "__members__", None)
    methods, properties, nested = {}, {}, {}
    for name, value in vars(kind).items():
        if isinstance(value, property):
            properties[name] = [(function.__doc__ or "") if function else None for function in (value.fget, value.fset)]
        elif isinstance(value, type):
            nested[name] = _describe_class(value)
        elif callable(value) and "(self" in (value.__doc__ or "") and name not in ("__del__",):
            methods[name] = signatures_in(name, value.__doc__ or "")
    return {
        "bases": [base.__name__ for base in kind.__bases__],
        "members": {name: int(value) for name, value in members.items()} if isinstance(members, Mapping) else None,
        "methods": {} if isinstance(members, Mapping) else methods,
        "properties": {} if isinstance(members, Mapping) else properties,
        "nested": nested,
    }


def signatures_in(name: str, documentation: str) -> list[str]:
    """Return the signatures of a method, one per overload, as pybind11 writes them."""
    pattern = re.compile(rf"^(?:\d+\. )?{re.escape(name)}(\(self: .*\) -> .*)$", re.MULTILINE)
    return pattern.findall(documentation)


@functools.cache
def description(version: str) -> dict[str, Any]:
    """Return the description of an installed release of TensorRT's bindings, read in a process of its own."""
    folder = BINDINGS / version
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not (folder / "tensorrt_bindings").is_dir() or compiler is None:
        raise FileNotFoundError(f"{folder} holds no bindings, or there is no C compiler: make test brings the bindings")
    stubs = ROOT / "build" / "gpu-simulator" / version
    stubs.mkdir(parents=True, exist_ok=True)
    major = version.split(".", maxsplit=1)[0]
    for library, source in (("nvinfer", _STUB), ("nvinfer_plugin", "int x_;"), ("nvonnxparser", "int x_;")):
        target = stubs / f"lib{library}.so.{major}"
        if not target.exists():
            fresh = target.with_name(f"{target.name}.{id(target)}")
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{target.name}", "-o", str(fresh), "-x", "c", "-"]
            subprocess.run(command, input=source, text=True, check=True)
            fresh.replace(target)
    program = (
        f"import json, sys; sys.path[:0] = [{str(folder)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "import tensorrt_bindings\nfrom gpu_simulator.bindings import describe\n"
        "print(json.dumps(describe(tensorrt_bindings)))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"LD_LIBRARY_PATH": str(stubs)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --------------------------------------------------------------------------------------------------- checking
@dataclass(frozen=True)
class Parameter:
    """One parameter of a signature; `default` is text, None without one."""

    name: str
    annotation: str
    default: str | None


@dataclass(frozen=True)
class Signature:
    """One overload."""

    parameters: tuple[Parameter, ...]
    text: str


@functools.cache
def parsed(text: str) -> Signature:
    """Parse "(self: m.A, name: str, count: typing.SupportsInt = 0) -> bool"; self is dropped."""
    inside = _inside(text)
    parts = [part for part in _split(inside) if part and part not in ("/", "*")]
    parameters = []
    for part in parts:
        name, _, rest = part.partition(": ")
        annotation, _, default = rest.partition(" = ")
        parameters.append(Parameter(name, annotation.strip(), default.strip() if " = " in rest else None))
    return Signature(tuple(parameters[1:]), text.strip())


def _inside(text: str) -> str:
    """Return what the first pair of parentheses holds."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "([<{") - (letter in ")]}" or (letter == ">" and text[index - 1] != "-"))
        if depth == 0 and index:
            return text[1:index]
    raise ValueError(text)


def _split(text: str) -> list[str]:
    parts, depth, begin = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "([<{") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append(text[begin:index].strip())
            begin = index + 1
    return [*parts, text[begin:].strip()]


class Checker:
    """Binds arguments to signatures of one generated module."""

    def __init__(self, classes: Mapping[str, type]) -> None:
        self._classes = classes

    def bind(
        self, name: str, texts: Iterable[str], instance: Any, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> list[Any]:
        """Return the arguments in order for the first overload that takes them.

        Raises:
            TypeError: none does, in pybind11's words.
        """
        texts = list(texts)
        for text in texts:
            bound = self._bound(parsed(text), positional, named)
            if bound is not None:
                return bound
        kinds = "\n".join(f"    {index + 1}. {parsed(text).text}" for index, text in enumerate(texts))
        given = ", ".join([repr(instance), *map(repr, positional), *(f"{k}={v!r}" for k, v in named.items())])
        what = "constructor" if name == "__init__" else "function"
        raise TypeError(
            f"{name}(): incompatible {what} arguments. The following argument types are supported:\n{kinds}\n\n"
            f"Invoked with: {given}"
        )

    def _bound(self, signature: Signature, positional: tuple[Any, ...], named: dict[str, Any]) -> list[Any] | None:
        parameters = signature.parameters
        if len(positional) > len(parameters):
            return None
        rest = dict(named)
        values = []
        for index, parameter in enumerate(parameters):
            if index < len(positional):
                if parameter.name in rest:
                    return None
                value = positional[index]
            elif parameter.name in rest and not re.fullmatch(r"arg\d+", parameter.name):
                value = rest.pop(parameter.name)
            elif parameter.default is not None:
                values.append(self._default(parameter.default))
                continue
            else:
                return None
            if not self.accepts(parameter, value):
                return None
            values.append(value)
        return None if rest else values

    def _default(self, text: str) -> Any:
        found = re.fullmatch(r"<(\w+)\.(\w+): -?\d+>", text)
        if found:
            kind = self._classes.get(found[1]) or getattr(self._classes["ILogger"], found[1])
            return getattr(kind, found[2])
        return {"None": None, "True": True, "False": False}.get(
            text, int(text) if re.fullmatch(r"-?\d+", text) else text
        )

    def accepts(self, parameter: Parameter, value: Any) -> bool:
        """Return True if pybind11 would convert a value to the parameter's type."""
        annotation = parameter.annotation
        if annotation in ("object", "typing_extensions.CapsuleType"):
            return True
        if annotation == "str":
            return isinstance(value, str | bytes) or (value is None and parameter.default == "None")
        if annotation == "bool":
            return value is None or hasattr(value, "__bool__")
        if annotation == "typing.SupportsInt":
            return hasattr(value, "__index__") or (hasattr(value, "__int__") and not isinstance(value, float | str))
        if annotation == "typing.SupportsFloat":
            return hasattr(value, "__float__") or hasattr(value, "__index__")
        if annotation == "typing_extensions.Buffer":
            return isinstance(value, bytes | bytearray | memoryview) or hasattr(value, "__array_interface__")
        if annotation in ("tuple", "list"):
            return isinstance(value, tuple if annotation == "tuple" else list)
        if annotation == "collections.abc.Sequence[typing.SupportsInt]":
            return isinstance(value, list | tuple) and all(hasattr(entry, "__index__") for entry in value)
        name = re.sub(r"^.*(?:\.|::)", "", annotation)
        kind = self._classes.get(name) or getattr(self._classes.get("ILogger"), name, None)
        if kind is None:
            raise NotSimulatedError(f"an argument of type {annotation}")
        if name == "Dims" and isinstance(value, list | tuple):
            return all(hasattr(entry, "__index__") for entry in value)
        if name == "ILogger" and "_state" in vars(kind) and isinstance(value, kind) and not hasattr(value, "_state"):
            raise TypeError(f"{type(value).__name__}.__init__() must be called when overriding __init__")
        nothing = value is None and not hasattr(kind, "__members__") and name not in ("ILogger", "Dims")
        return nothing or isinstance(value, kind)


# --------------------------------------------------------------------------------------------------- generating
def enumeration(name: str, members: Mapping[str, int]) -> type:
    """Return a class that behaves like pybind11's enumerations: by name, int() and comparison with its own kind."""

    class Enumeration:
        __members__: dict[str, Any] = {}  # noqa: RUF012  # pybind11 has it so

        def __new__(cls, value: int) -> Any:
            try:
                return next(member for member in cls.__members__.values() if member.value == int(value))
            except StopIteration:
                raise ValueError(f"{value} is not a valid {cls.__name__}") from None

        def __int__(self) -> int:
            return self.value

        __index__ = __int__

        def __hash__(self) -> int:
            return hash(self.value)

        def __eq__(self, other: object) -> bool:
            return type(self) is type(other) and self.value == other.value  # type: ignore[attr-defined]

        def __repr__(self) -> str:
            return f"<{name}.{self.name}: {self.value}>"

        def __str__(self) -> str:
            return f"{name}.{self.name}"

        def __reduce__(self) -> Any:
            return type(self), (self.value,)

        name: str
        value: int

    Enumeration.__name__ = Enumeration.__qualname__ = name
    for member, value in members.items():
        made = object.__new__(Enumeration)
        made.name, made.value = member, value
        Enumeration.__members__ = {**Enumeration.__members__, member: made}
        setattr(Enumeration, member, made)
    return Enumeration


def generate(
    description: Mapping[str, Any],
    states: Mapping[str, type],
    functions: Mapping[str, Callable[..., Any]],
    *,
    title: str,
    real: Any = None,
) -> types.ModuleType:
    """Return a module with the classes and functions of a description.

    Args:
        description: from `describe`.
        states: class name -> what an object does; its attributes and methods bear the real names.
        functions: of the module, by their real names.
        title: import name of the module.
        real: the real bindings: classes that have no state are taken from there.
    """
    module = types.ModuleType(title)
    module.__version__ = description["version"]  # type: ignore[attr-defined]
    classes: dict[str, Any] = {}
    checker = Checker(classes)
    module._checker = checker  # type: ignore[attr-defined]
    pending = dict(description["classes"])
    while pending:
        for name in list(pending):
            described = pending[name]
            bases = [base for base in described["bases"] if base in description["classes"]]
            if any(base in pending for base in bases):
                continue
            del pending[name]
            if real is not None and name not in states:
                classes[name] = getattr(real, name)
            elif described["members"] is not None:
                classes[name] = enumeration(name, described["members"])
            else:
                parents = tuple(classes[base] for base in bases)
                classes[name] = _class(name, described, parents, states.get(name), checker, module)
            setattr(module, name, classes[name])
    for name, (kind, member) in description["constants"].items():
        if kind in classes:
            setattr(module, name, getattr(classes[kind], member))
    for name in description["functions"]:
        setattr(module, name, getattr(real, name) if real is not None else functions.get(name, _missing(name)))
    module.nptype = real.nptype if real is not None else functools.partial(_numpy_type, module)  # type: ignore[attr-defined]
    module.volume = math.prod  # type: ignore[attr-defined]
    return module


def _missing(name: str) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise NotSimulatedError(f"{name}: add it to tests/gpu_simulator")

    return function


def _numpy_type(module: Any, kind: Any) -> Any:
    """trt.nptype: raises TypeError for types that numpy lacks."""
    import numpy as np

    names = {
        "FLOAT": "float32",
        "HALF": "float16",
        "INT8": "int8",
        "INT32": "int32",
        "INT64": "int64",
        "BOOL": "bool",
        "UINT8": "uint8",
    }
    if kind.name not in names:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return np.dtype(names[kind.name]).type


def wrap(module: Any, name: str, state: Any) -> Any:
    """Return a new object of a generated class around its state."""
    kind = getattr(module, name)
    made = kind.__new__(kind)
    object.__setattr__(made, "_state", state)
    state.handle = weakref.ref(made)
    return made


def _class(
    name: str,
    described: Mapping[str, Any],
    parents: tuple[type, ...],
    state: type | None,
    checker: Checker,
    module: Any,
) -> type:
    body: dict[str, Any] = {
        "__module__": module.__name__,
        "__slots__": ("_state", "__weakref__") if not parents else (),
    }
    for method, texts in described["methods"].items():
        if method not in ("__init__", "__repr__", "__str__", "__eq__", "__hash__") and texts:
            body[method] = _method(name, method, tuple(texts), checker)
    for attribute, (reads, writes) in described["properties"].items():
        body[attribute] = _property(name, attribute, reads, writes, checker)
    constructors = described["methods"].get("__init__")
    plain = name in ("IHostMemory",)
    body["__init__"] = _constructor(name, constructors, state, checker, module)
    body["__setattr__"] = _only_known
    if plain:
        body.pop("__slots__")
        body.pop("__setattr__")
        body.pop("__init__")
        parents = (bytes,)
        body["nbytes"] = property(len)
    for inner, content in described["nested"].items():
        if any(hasattr(parent, inner) for parent in parents):
            continue  # the same enumeration under a second name
        body[inner] = enumeration(inner, content["members"] or {})
        body.update({key: getattr(body[inner], key) for key in content["members"] or {}})
    if state is not None and hasattr(state, "__bool__"):
        body["__bool__"] = lambda self: bool(self._state)
    if state is not None and hasattr(state, "released"):
        body["__del__"] = _released
    return type(name, parents or (object,), body)


def _released(self: Any) -> None:
    state = getattr(self, "_state", None)
    if state is not None:
        # Raised from a destructor a violation would only be printed: recorded, it fails the test.
        with contextlib.suppress(ViolationError):
            state.released()


def _only_known(self: Any, name: str, value: Any) -> None:
    if type(self).__module__ in ("tensorrt", "tensorrt_rtx") and not hasattr(type(self), name):
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
    object.__setattr__(self, name, value)


def _constructor(name: str, texts: list[str] | None, state: type | None, checker: Checker, module: Any) -> Any:
    def __init__(self: Any, *positional: Any, **named: Any) -> None:  # noqa: N807
        if not texts:
            raise TypeError(f"{module.__name__}.{name}: No constructor defined!")
        bound = checker.bind("__init__", texts, name, positional, named)
        object.__setattr__(self, "_state", state(module, *bound) if state is not None else None)
        if state is not None:
            self._state.handle = weakref.ref(self)
        if state is not None and getattr(self._state, "failed", False):
            raise TypeError("pybind11::init(): factory function returned nullptr")

    return __init__


def _method(kind: str, name: str, texts: tuple[str, ...], checker: Checker) -> Callable[..., Any]:
    def method(self: Any, *positional: Any, **named: Any) -> Any:
        bound = checker.bind(name, texts, self, positional, named)
        state = getattr(self, "_state", None)
        if state is None:
            return None  # an interface: subclasses do something
        does = getattr(state, name, None)
        if does is None:
            raise NotSimulatedError(f"{kind}.{name}: add it to tests/gpu_simulator")
        return does(*bound)

    method.__name__ = name
    return method


def _property(kind: str, name: str, reads: str | None, writes: str | None, checker: Checker) -> property:
    def get(self: Any) -> Any:
        state = getattr(self, "_state", None)
        if not hasattr(state, name):
            raise NotSimulatedError(f"{kind}.{name}: add it to tests/gpu_simulator")
        return getattr(state, name)

    def put(self: Any, value: Any) -> None:
        checker.bind(name, [writes.strip()] if writes else [], self, (value,), {})
        setattr(self._state, name, value)

    return property(get if reads is not None else None, put if writes is not None else None)
