"""Names of classes and functions that a checkpoint may mention.

None of them is ever looked up or called, so a refusal protects from nothing: it shows that the file is hostile.
"""

import sys


def is_harmless(module: str, name: str) -> bool:
    """Return True if a name can belong to a value that training scripts save beside the weights.

    Of the standard library, types of data are; everything else in it is not, `os.system` and `builtins.eval` above
    all. Of other packages, everything is but what loads or runs something.
    """
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names:
        plain_name = "." not in name or module in _DATA_MODULES_WITH_METHODS
        return plain_name and (module in _DATA_MODULES or (module, name) in _DATA_NAMES or _is_exception(module, name))
    parts = name.split(".")
    if root in _LOADERS or parts[-1] in _RUNNING_NAMES:
        return False
    return not _RUNNING_MODULES.intersection((*module.split(".")[1:], *parts[:-1]))


def _is_exception(module: str, name: str) -> bool:
    return module == "builtins" and name.endswith(("Error", "Exception", "Warning"))


_DATA_MODULES = {
    "argparse",
    "array",
    "calendar",
    "collections",
    "collections.abc",
    "copyreg",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "ipaddress",
    "itertools",
    "logging",
    "math",
    "numbers",
    "pathlib",
    "pathlib._local",
    "random",
    "re",
    "string",
    "time",
    "typing",
    "uuid",
    "zoneinfo",
}
_DATA_MODULES_WITH_METHODS = {"zoneinfo"}  # ZoneInfo._unpickle
_DATA_NAMES = {
    *(
        ("builtins", name)
        for name in [
            "object",
            "list",
            "dict",
            "tuple",
            "set",
            "frozenset",
            "int",
            "float",
            "complex",
            "str",
            "bool",
            "bytes",
            "bytearray",
            "range",
            "slice",
            "type",
            "Ellipsis",
            "NotImplemented",
            "getattr",
            "reversed",
            "enumerate",
            "zip",
            "map",
            "filter",
            "iter",
            "len",
            "min",
            "max",
            "sum",
            "abs",
            "round",
            "sorted",
            "print",
        ]
    ),
    ("_codecs", "encode"),
    ("functools", "partial"),
    ("http", "HTTPStatus"),
    ("inspect", "_empty"),
    ("operator", "attrgetter"),
    ("operator", "itemgetter"),
    ("operator", "getitem"),
    ("signal", "Signals"),
    ("types", "SimpleNamespace"),
    ("types", "MappingProxyType"),
    ("types", "GenericAlias"),
}
_RUNNING_MODULES = {
    "os",
    "posix",
    "nt",
    "sys",
    "subprocess",
    "builtins",
    "importlib",
    "shutil",
    "socket",
    "ctypes",
    "runpy",
}
_RUNNING_NAMES = {
    "system",
    "popen",
    "Popen",
    "exec",
    "eval",
    "execfile",
    "runstring",
    "check_call",
    "check_output",
    "load",
    "loads",
    "load_url",
    "load_state_dict_from_url",
    "download_url_to_file",
    "__import__",
    "import_module",
    "load_module",
    "run_path",
    "run_module",
}
# Modules that are no part of this Python's standard library, but were of another, or that run or load things.
_LOADERS = {
    "commands",
    "popen2",
    "imp",
    "distutils",
    "asyncore",
    "pip",
    "setuptools",
    "pkg_resources",
    "dill",
    "cloudpickle",
}
