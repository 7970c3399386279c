"""A pickle reader that builds inert values only (see `srdeploy.models.checkpoint.inert`) and imports nothing.

It is a small stack machine of our own rather than a subclass of `pickle.Unpickler`, because the standard machine
creates objects, hashes what the file tells it to hash and allocates what the file claims. Here, every opcode of
protocols 0 to 5 is one short function; the number of operations and the length of every item are bounded, so reading
takes time and memory in proportion to the bytes really present.

Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

import codecs
import struct
from collections.abc import Callable
from typing import Any

from srdeploy.models.checkpoint.filebytes import RefusedError, shown
from srdeploy.models.checkpoint.inert import Record, dict_key, instance, named, rebuilt

MOST_OPERATIONS = 600_000
"""A default-size RCAN needs about 55,000, with its EMA copy and Adam state 270,000, as a pickled module 250,000."""
MOST_BYTES = 32 * 1024**2
"""Of one pickle, without tensor data; a default-size RCAN has about 0.2 MB."""

_LONGEST_INTEGER_BYTES = 64
_DAMAGED = "copy or download the file again"

PersistentLoad = Callable[[Any], Any]


def unpickle(data: bytes, start: int, persistent_load: PersistentLoad) -> tuple[Any, int]:
    """Read one pickle.

    Args:
        data: the bytes that hold the pickle.
        start: where it begins.
        persistent_load: turns a persistent id (how torch names storages) into an inert value.

    Returns:
        The inert value and the position after the pickle.

    Raises:
        RefusedError: it is damaged, too large, or asks for something a checkpoint has no business with.
    """
    machine = _Machine(data, start, persistent_load)
    for _ in range(MOST_OPERATIONS):
        code = machine.byte()
        operation = _OPERATIONS.get(code)
        if operation is None:
            raise RefusedError(f"is damaged: pickle opcode 0x{code:02x} is not used in checkpoints", next_step=_DAMAGED)
        operation(machine)
        if machine.result is not _RUNNING:
            return machine.result, machine.position
    raise RefusedError(
        f"holds a pickle of more than {MOST_OPERATIONS:,} operations",
        expected="a checkpoint (a default-size RCAN with all its training state takes 300,000)",
    )


_RUNNING = object()


def _ends_early() -> RefusedError:
    return RefusedError("is truncated: it ends inside a pickle", next_step=_DAMAGED)


class _Machine:
    """The state of the pickle machine: a stack, marks into it, and the memo."""

    __slots__ = ("data", "marks", "memo", "persistent_load", "position", "result", "stack")

    def __init__(self, data: bytes, start: int, persistent_load: PersistentLoad) -> None:
        self.data = data
        self.position = start
        self.persistent_load = persistent_load
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = _RUNNING

    def byte(self) -> int:
        try:
            code = self.data[self.position]
        except IndexError:
            raise _ends_early() from None
        self.position += 1
        return code

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.data):
            raise _ends_early()
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise _ends_early()
        taken = self.data[self.position : end]
        self.position = end + 1
        return taken

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise RefusedError("is damaged: its pickle takes more from the stack than it put there", next_step=_DAMAGED)
        return self.stack.pop()

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise RefusedError("is damaged: its pickle takes more from the stack than it put there", next_step=_DAMAGED)
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise RefusedError("is damaged: its pickle closes a list that was not opened", next_step=_DAMAGED)
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def remembered(self, index: int) -> Any:
        try:
            return self.memo[index]
        except KeyError:
            what = f"is damaged: its pickle refers to value {index}, which it does not hold"
            raise RefusedError(what, next_step=_DAMAGED) from None


# ----------------------------------------------------------------------------------------------------------------------
# Makers of opcode functions

_Operation = Callable[[_Machine], None]


def _push(value: Any) -> _Operation:
    return lambda machine: machine.stack.append(value)


def _push_number(layout: str) -> _Operation:
    packed = struct.Struct(layout)

    def operation(machine: _Machine) -> None:
        machine.stack.append(packed.unpack(machine.take(packed.size))[0])

    return operation


def _push_sized(length_layout: str, convert: Callable[[bytes], Any]) -> _Operation:
    packed = struct.Struct(length_layout)

    def operation(machine: _Machine) -> None:
        length = packed.unpack(machine.take(packed.size))[0]
        if length < 0:
            raise RefusedError("is damaged: a length in its pickle is negative", next_step=_DAMAGED)
        machine.stack.append(convert(machine.take(length)))

    return operation


def _push_line(convert: Callable[[bytes], Any]) -> _Operation:
    return lambda machine: machine.stack.append(convert(machine.line()))


def _push_tuple(count: int) -> _Operation:
    def operation(machine: _Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return operation


def _put(layout: str) -> _Operation:
    packed = struct.Struct(layout)

    def operation(machine: _Machine) -> None:
        machine.memo[packed.unpack(machine.take(packed.size))[0]] = machine.top()

    return operation


def _get(layout: str) -> _Operation:
    packed = struct.Struct(layout)

    def operation(machine: _Machine) -> None:
        machine.stack.append(machine.remembered(packed.unpack(machine.take(packed.size))[0]))

    return operation


def _refuse(what: str) -> _Operation:
    def operation(machine: _Machine) -> None:
        raise RefusedError(f"uses {what}, which torch.save never writes", next_step=_DAMAGED)

    return operation


# ----------------------------------------------------------------------------------------------------------------------
# Text to values


def _utf8(data: bytes) -> str:
    # surrogatepass: what pickle itself uses, so that every string Python can write is read.
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise RefusedError("is damaged: a text in its pickle is not UTF-8", next_step=_DAMAGED) from None


def _latin1(data: bytes) -> str:
    """Python 2 strings: latin-1 maps every byte to one character, so nothing can fail or be lost."""
    return data.decode("latin-1")


def _quoted(line: bytes) -> str:
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise RefusedError("is damaged: a quoted text in its pickle has no end", next_step=_DAMAGED)
    try:
        return _latin1(codecs.escape_decode(line[1:-1])[0])
    except ValueError:
        raise RefusedError("is damaged: a quoted text in its pickle has a broken escape", next_step=_DAMAGED) from None


def _raw_unicode(line: bytes) -> str:
    try:
        return line.decode("raw-unicode-escape")
    except UnicodeDecodeError:
        raise RefusedError("is damaged: a text in its pickle has a broken escape", next_step=_DAMAGED) from None


def _ascii_text(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise RefusedError("is damaged: a class name in its pickle is not text", next_step=_DAMAGED) from None


def _decimal(line: bytes) -> int:
    if line in (b"00", b"01"):  # protocol 0 booleans
        return line == b"01"
    digits = line.removesuffix(b"L")
    if len(digits) <= 2 * _LONGEST_INTEGER_BYTES:
        try:
            return int(digits)
        except ValueError:
            pass
    raise RefusedError("is damaged: a number in its pickle is not a number", next_step=_DAMAGED)


def _floating(line: bytes) -> float:
    try:
        return float(line)
    except ValueError:
        raise RefusedError("is damaged: a number in its pickle is not a number", next_step=_DAMAGED) from None


def _long(data: bytes) -> int:
    if len(data) > _LONGEST_INTEGER_BYTES:
        raise RefusedError(f"holds an integer of {len(data)} bytes", expected=f"at most {_LONGEST_INTEGER_BYTES}")
    return int.from_bytes(data, "little", signed=True)


# ----------------------------------------------------------------------------------------------------------------------
# Opcodes that work on the stack


def _stop(machine: _Machine) -> None:
    machine.result = machine.pop()


def _mark(machine: _Machine) -> None:
    machine.marks.append(len(machine.stack))


def _pop(machine: _Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


def _pop_mark(machine: _Machine) -> None:
    machine.pop_to_mark()


def _duplicate(machine: _Machine) -> None:
    machine.stack.append(machine.top())


def _empty_list(machine: _Machine) -> None:
    machine.stack.append([])


def _empty_dict(machine: _Machine) -> None:
    machine.stack.append({})


def _list(machine: _Machine) -> None:
    machine.stack.append(machine.pop_to_mark())


def _tuple(machine: _Machine) -> None:
    machine.stack.append(tuple(machine.pop_to_mark()))


def _dict(machine: _Machine) -> None:
    items = machine.pop_to_mark()
    machine.stack.append({})
    _set_items(machine, items)


def _append(machine: _Machine) -> None:
    value = machine.pop()
    _extend(machine, [value])


def _appends(machine: _Machine) -> None:
    _extend(machine, machine.pop_to_mark())


def _extend(machine: _Machine, values: list[Any]) -> None:
    target = machine.top()
    if isinstance(target, Record):
        if target.items is None:
            target.items = []
        target = target.items
    if not isinstance(target, list):
        raise RefusedError("is damaged: its pickle appends to something that is not a list", next_step=_DAMAGED)
    target.extend(values)


def _set_item(machine: _Machine) -> None:
    value = machine.pop()
    key = machine.pop()
    _set_items(machine, [key, value])


def _set_items_to_mark(machine: _Machine) -> None:
    _set_items(machine, machine.pop_to_mark())


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.top()
    if isinstance(target, Record):
        if target.items is None:
            target.items = {}
        target = target.items
    if not isinstance(target, dict) or len(items) % 2:
        raise RefusedError("is damaged: its pickle sets items of something that is not a dict", next_step=_DAMAGED)
    for index in range(0, len(items), 2):
        target[dict_key(items[index])] = items[index + 1]


def _global(machine: _Machine) -> None:
    module = _ascii_text(machine.line())
    machine.stack.append(named(module, _ascii_text(machine.line())))


def _stack_global(machine: _Machine) -> None:
    name = machine.pop()
    machine.stack.append(named(machine.pop(), name))


def _reduce(machine: _Machine) -> None:
    arguments = machine.pop()
    machine.stack.append(rebuilt(machine.pop(), arguments))


def _new_object(machine: _Machine) -> None:
    arguments = machine.pop()
    machine.stack.append(instance(machine.pop(), arguments))


def _new_object_keywords(machine: _Machine) -> None:
    machine.pop()  # keyword arguments: nothing that is read needs them
    _new_object(machine)


def _old_instance(machine: _Machine) -> None:
    """INST: the class by name, its arguments above the mark."""
    module = _ascii_text(machine.line())
    kind = named(module, _ascii_text(machine.line()))
    machine.stack.append(instance(kind, tuple(machine.pop_to_mark())))


def _old_object(machine: _Machine) -> None:
    """OBJ: the class and its arguments above the mark."""
    items = machine.pop_to_mark()
    if not items:
        raise RefusedError("is damaged: its pickle makes an object of no class", next_step=_DAMAGED)
    machine.stack.append(instance(items[0], tuple(items[1:])))


def _build(machine: _Machine) -> None:
    state = machine.pop()
    target = machine.top()
    if isinstance(target, Record):
        target.state = state
    # The state of a dict (`_metadata` of a state_dict), of a tensor or of a name says nothing about weights.


def _persistent_binary(machine: _Machine) -> None:
    machine.stack.append(machine.persistent_load(machine.pop()))


def _put_text(machine: _Machine) -> None:
    machine.memo[_decimal(machine.line())] = machine.top()


def _get_text(machine: _Machine) -> None:
    machine.stack.append(machine.remembered(_decimal(machine.line())))


def _push_byte(machine: _Machine) -> None:
    machine.stack.append(machine.byte())


def _put_byte(machine: _Machine) -> None:
    machine.memo[machine.byte()] = machine.top()


def _get_byte(machine: _Machine) -> None:
    machine.stack.append(machine.remembered(machine.byte()))


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.top()


def _protocol(machine: _Machine) -> None:
    version = machine.take(1)[0]
    if version > 5:
        raise RefusedError(f"has pickle protocol {shown(version)}", expected="0 to 5")


def _frame(machine: _Machine) -> None:
    machine.take(8)  # the frame's length, a hint for buffered readers


_OPERATIONS: dict[int, _Operation] = {
    # numbers and constants
    ord("N"): _push(None),
    0x88: _push(True),
    0x89: _push(False),
    ord("K"): _push_byte,
    ord("M"): _push_number("<H"),
    ord("J"): _push_number("<i"),
    ord("G"): _push_number(">d"),
    ord("I"): _push_line(_decimal),
    ord("L"): _push_line(_decimal),
    ord("F"): _push_line(_floating),
    0x8A: _push_sized("<B", _long),
    0x8B: _push_sized("<i", _long),
    # text and bytes; Python 2 strings are latin-1
    ord("X"): _push_sized("<I", _utf8),
    0x8C: _push_sized("<B", _utf8),
    0x8D: _push_sized("<Q", _utf8),
    ord("V"): _push_line(_raw_unicode),
    ord("S"): _push_line(_quoted),
    ord("T"): _push_sized("<i", _latin1),
    ord("U"): _push_sized("<B", _latin1),
    ord("B"): _push_sized("<I", bytes),
    ord("C"): _push_sized("<B", bytes),
    0x8E: _push_sized("<Q", bytes),
    0x96: _push_sized("<Q", bytes),
    # containers; a set is a list here, so that nothing is hashed
    ord("("): _mark,
    ord("]"): _empty_list,
    ord("}"): _empty_dict,
    ord(")"): _push(()),
    0x8F: _empty_list,
    ord("l"): _list,
    ord("t"): _tuple,
    ord("d"): _dict,
    0x91: _list,
    0x85: _push_tuple(1),
    0x86: _push_tuple(2),
    0x87: _push_tuple(3),
    ord("a"): _append,
    ord("e"): _appends,
    0x90: _appends,
    ord("s"): _set_item,
    ord("u"): _set_items_to_mark,
    # names, calls and instances: all inert
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): _reduce,
    0x81: _new_object,
    0x92: _new_object_keywords,
    ord("i"): _old_instance,
    ord("o"): _old_object,
    ord("b"): _build,
    ord("Q"): _persistent_binary,
    ord("P"): _refuse("a textual persistent id"),
    0x82: _refuse("the extension registry"),
    0x83: _refuse("the extension registry"),
    0x84: _refuse("the extension registry"),
    0x97: _refuse("out-of-band buffers"),
    0x98: _refuse("out-of-band buffers"),
    # stack and memo
    ord("0"): _pop,
    ord("1"): _pop_mark,
    ord("2"): _duplicate,
    ord("p"): _put_text,
    ord("q"): _put_byte,
    ord("r"): _put("<I"),
    ord("g"): _get_text,
    ord("h"): _get_byte,
    ord("j"): _get("<I"),
    0x94: _memoize,
    # frame of the stream
    0x80: _protocol,
    0x95: _frame,
    ord("."): _stop,
}
