"""Read a pickle as inert values: the standard library's machine without any opcode that makes or changes objects.

Python's own unpickler in its pure form (`pickle._Unpickler`), because the compiled one cannot be kept from hashing:
it crashed on a key nested 250,000 deep and took over 20 s for 100,000 keys of one hash (CPython 3.11). A scan with
`pickletools.genops` before it bounds the number of operations and admits known opcodes only, so that reading takes
time and memory in proportion to the bytes that are present. Nothing is imported, looked up or called.
"""

import io
import pickle
import pickletools
import struct
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

from srdeploy.models.checkpoint.filebytes import RefusedError, shown
from srdeploy.models.checkpoint.inert import Record, dict_key, instance, named, rebuilt

MAX_OPERATIONS = 600_000
"""A default-size RCAN needs about 55,000, with its EMA copy and Adam state 280,000, as a pickled module 250,000."""
MAX_BYTES = 100 * 1024**2
"""Of one pickle. Tensors lie outside of it (a default-size RCAN leaves 0.2 MB), NumPy arrays inside (95 MB)."""

PersistentLoad = Callable[[Any], Any]

# Not among them: the extension registry, out-of-band buffers, textual persistent ids, integers beyond 255 bytes.
_OPCODES = frozenset(
    """
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
    EMPTY_SET ADDITEMS FROZENSET MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET MEMOIZE
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ NEWOBJ_EX INST OBJ BUILD BINPERSID PROTO FRAME STOP
    """.split()  # noqa: SIM905 - sixty quoted names are no easier to read
)
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    IndexError,
    KeyError,
    ValueError,  # UnicodeDecodeError included
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
)
_AGAIN = "copy or download the file again"


def unpickle(data: bytes, start: int, persistent_load: PersistentLoad) -> tuple[Any, int]:
    """Read one pickle.

    Args:
        data: the bytes that hold the pickle.
        start: where it begins.
        persistent_load: turns a persistent id (how torch names storages) into an inert value.

    Returns:
        The inert value and the position after the pickle.

    Raises:
        RefusedError: it is damaged, too large, or asks for something that no checkpoint needs.
    """
    stream = io.BytesIO(data)
    stream.seek(start)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in texts of Python 2
            _scan(stream)
            end = stream.tell()
            stream.seek(start)
            return _InertUnpickler(stream, persistent_load).load(), end
    except _DAMAGE as error:
        detail = shown(str(error) or type(error).__name__, 100)
        raise RefusedError(
            f"is truncated or damaged: its pickle cannot be read ({detail})", next_step=_AGAIN
        ) from error


def _scan(stream: io.BytesIO) -> None:
    """Move past one pickle; refuse opcodes that no checkpoint uses, and too many operations."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name not in _OPCODES:
            raise RefusedError(f"uses the pickle opcode {opcode.name}, which torch.save never writes", next_step=_AGAIN)
        if opcode.name == "PROTO" and isinstance(argument, int) and argument > pickle.HIGHEST_PROTOCOL:
            raise RefusedError(f"has pickle protocol {argument}", expected="0 to 5")
        if count >= MAX_OPERATIONS:
            raise RefusedError(
                f"holds a pickle of more than {MAX_OPERATIONS:,} operations",
                expected="a checkpoint (a default-size RCAN with all its training state takes 300,000)",
            )


class _InertUnpickler(pickle._Unpickler):
    """`pickle._Unpickler` with inert values: names, records, and dicts whose keys are cheap to hash."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO, persistent_load: PersistentLoad) -> None:
        # Python 2 strings are bytes: latin-1 maps each to one character, so nothing fails or is lost.
        super().__init__(stream, fix_imports=False, encoding="latin-1")
        self.persistent_load = persistent_load  # type: ignore[assignment, method-assign]

    def find_class(self, module: str, name: str) -> Any:
        return named(module, name)

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.append(rebuilt(self.stack.pop(), arguments))

    def _load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.append(instance(self.stack.pop(), arguments))

    def _load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments: nothing that is read needs them
        self._load_newobj()

    def _instantiate(self, kind: Any, arguments: list[Any]) -> None:
        """INST and OBJ of protocols 0 and 1."""
        self.append(instance(kind, tuple(arguments)))

    def _load_build(self) -> None:
        # The state of a dict (`_metadata` of a state_dict), of a tensor or of a name is not needed for weights.
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    def _load_append(self) -> None:
        self._extend([self.stack.pop()])

    def _load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.items = target.items or []
            target = target.items
        if not isinstance(target, list):
            raise TypeError("items appended to something that is not a list")
        target.extend(values)

    def _load_setitem(self) -> None:
        value = self.stack.pop()
        self._set_items([self.stack.pop(), value])

    def _load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.items = target.items or {}
            target = target.items
        if not isinstance(target, dict):
            raise TypeError("items set in something that is not a dict")
        for index in range(0, len(items), 2):
            target[dict_key(items[index])] = items[index + 1]

    def _load_set(self) -> None:
        """Sets are lists here, so that nothing is hashed."""
        self.append([])

    def _load_frozenset(self) -> None:
        self.append(self.pop_mark())

    def _load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))  # Python's own would allocate what the file claims

    for _opcode, _handler in {
        pickle.REDUCE: _load_reduce,
        pickle.NEWOBJ: _load_newobj,
        pickle.NEWOBJ_EX: _load_newobj_ex,
        pickle.BUILD: _load_build,
        pickle.APPEND: _load_append,
        pickle.APPENDS: _load_appends,
        pickle.SETITEM: _load_setitem,
        pickle.SETITEMS: _load_setitems,
        pickle.DICT: _load_dict,
        pickle.EMPTY_SET: _load_set,
        pickle.ADDITEMS: _load_appends,
        pickle.FROZENSET: _load_frozenset,
        pickle.BYTEARRAY8: _load_bytearray8,
    }.items():
        dispatch[_opcode[0]] = _handler
