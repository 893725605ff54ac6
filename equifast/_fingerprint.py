"""What tells one model, attack, defense or detector from another: its weights, its settings, its code."""

import copy
import dataclasses
import dis
import functools
import hashlib
import sys
import types
from collections.abc import Iterable, Mapping
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "FRAMEWORK",
    "Known",
    "alike",
    "copy_of",
    "describe",
    "fingerprint",
    "hooks",
    "stamp",
    "tensors_of",
    "weights",
]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks(module: nn.Module) -> int:
    """How many hooks a module has, but for those that :mod:`equifast.features` sets for the length of a call."""
    return sum(not _passing(hook) for kind in _HOOKS for hook in tuple(getattr(module, kind).values()))


def _passing(hook: object) -> bool:
    return getattr(hook, "__module__", None) == "equifast.features"


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode, without such hooks: another thread may be in the middle of a call."""
    found = copy.deepcopy(model).eval()
    for module in found.modules():
        for kind in _HOOKS:
            kept = getattr(module, kind)
            for key in [key for key, hook in kept.items() if _passing(hook)]:
                del kept[key]
    return found


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a module, those too that its state dict leaves out."""
    return [*chain(module.parameters(), module.buffers())]


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Sixteen hexadecimal digits of the values of tensors, in their order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def weights(module: nn.Module) -> str:
    """Sixteen hexadecimal digits of all that a module has learned."""
    return fingerprint(tensors_of(module))


def alike(module: nn.Module, other: nn.Module) -> bool:
    """Whether another module differs in its weights alone."""
    shapes, others = ([(t.shape, t.dtype) for t in tensors_of(m)] for m in (module, other))
    return type(module) is type(other) and shapes == others


def stamp(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """What changes when weights of a module are changed in place or replaced; it does not look at them."""
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors_of(module))


Known = dict[int, tuple[object, Any]]
"""Modules and functions by id, and what was told of each: weights are read once."""


def describe(thing: object, known: Known | None = None, seen: tuple[int, ...] = ()) -> Any:
    """What decides the results of an attack, a defense, a view or whatever, as values that JSON can hold.

    Of modules the class, the weights, and plain attributes of them and of their submodules (so one that counts its
    calls in such an attribute is another after each); of other objects, users' classes among them, all attributes; of
    functions the code, what they close over, their defaults, and plain values and functions of their own module that
    they name, but for values that they set. Of classes that are neither Python's, PyTorch's nor ours the methods, in
    the same way, and plain attributes count too. An object may tell by itself, with ``_described()``. ``known`` may be
    given to calls that follow each other.
    """
    known = {} if known is None else known
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if id(thing) in seen:
        return type(thing).__qualname__
    seen = (*seen, id(thing))
    if isinstance(thing, type):
        return _class(thing)
    if callable(own := getattr(type(thing), "_described", None)):  # of the class: an object may answer to every name
        return describe(own(thing), known, seen)
    if isinstance(thing, Tensor):
        return {"tensor": fingerprint([thing])}
    if isinstance(thing, nn.Module):
        if id(thing) not in known:
            told = {"tensors": weights(thing), "settings": _plain(thing)}
            known[id(thing)] = thing, {"class": _class(type(thing)), **told}
        return known[id(thing)][1]
    if isinstance(thing, Mapping):
        return {str(key): describe(value, known, seen) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [describe(value, known, seen) for value in thing]
    if isinstance(thing, set | frozenset):
        return sorted((describe(value, known, seen) for value in thing), key=repr)
    if isinstance(thing, np.ndarray):
        return {"array": hashlib.sha256(repr((thing.shape, thing.dtype)).encode() + thing.tobytes()).hexdigest()[:16]}
    if isinstance(thing, np.generic):
        return describe(thing.item(), known, seen)
    if isinstance(thing, _NAMED):
        return str(thing)
    if isinstance(thing, functools.partial):
        return {
            "partial": describe(thing.func, known, seen),
            "given": describe([thing.args, thing.keywords], known, seen),
        }
    if isinstance(thing, types.MethodType):
        return {"method": thing.__qualname__, "of": describe(thing.__self__, known, seen)}
    if isinstance(thing, types.FunctionType):
        if id(thing) not in known:
            inner = [_content(cell) for cell in thing.__closure__ or ()]
            given = [inner, thing.__defaults__ or [], thing.__kwdefaults__ or {}]
            told = {"given": describe(given, known, seen)} if any(given) else {}
            known[id(thing)] = thing, {"function": thing.__qualname__, "code": _program([thing]), **told}
        return known[id(thing)][1]
    if isinstance(thing, _CACHED):
        return describe(thing.__wrapped__, known, seen)
    names = set(getattr(thing, "__dict__", ()))
    for k in type(thing).__mro__:
        slots = vars(k).get("__slots__", ())
        names |= {name for name in ((slots,) if isinstance(slots, str) else slots) if hasattr(thing, name)}
    if dataclasses.is_dataclass(thing):
        names |= {field.name for field in dataclasses.fields(thing)}  # which may lie in slots
    home = type(thing).__module__
    if not names or (home.partition(".")[0] in sys.stdlib_module_names and home != "__main__"):
        return getattr(thing, "__qualname__", _class(type(thing)))  # a builtin, a lock, a logger
    attributes = {name: describe(getattr(thing, name), known, seen) for name in sorted(names) if name != "_cheap"}
    return {"class": _class(type(thing)), **attributes}


_OTHERS = frozenset(("torch", "equifast", "builtins"))  # whose versions are told apart from these


_NAMED = (torch.dtype, torch.device, torch.memory_format, Path, Enum, range, bytes, complex, slice, Fraction, Decimal)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _home(thing: Any) -> str:
    """The package that something comes from."""
    return str(getattr(thing, "__module__", None) or "builtins").partition(".")[0]


def _class(kind: type) -> str:
    """Its name, and where it is a user's sixteen hexadecimal digits of its methods and plain attributes."""
    own = [k for k in kind.__mro__ if _home(k) not in _OTHERS and _home(k) not in sys.stdlib_module_names - _MAIN]
    functions, plain = [], []
    for k in own:
        for name, value in sorted(vars(k).items()):
            if isinstance(function := _plain_function(value), types.FunctionType):
                functions.append(function)
            elif _is_plain(value) and not name.startswith("__"):
                plain.append((name, repr(value)))
    if not functions and not plain:
        return kind.__qualname__
    return f"{kind.__qualname__} {_digest((_program(functions), plain))}"


_MAIN = frozenset(("__main__",))
_CACHED = type(functools.cache(len))


def _plain_function(value: object) -> object:
    """The function in a method, class method, static method, property or cache."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property | functools.partialmethod):
        value = value.func
    return value.__wrapped__ if isinstance(value, _CACHED) else value


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _program(functions: Iterable[types.FunctionType]) -> str:
    """Sixteen hexadecimal digits of what functions do, wherever they stand in their file, with those that they name."""
    found: dict[int, tuple[types.FunctionType, Any]] = {}
    left = list(functions)
    while left:
        function = left.pop()
        if id(function) in found:
            continue
        names = _named_by(function)
        cells = [_plain_function(_content(cell)) for cell in function.__closure__ or ()]
        left += [f for f in (*map(_plain_function, names.values()), *cells) if isinstance(f, types.FunctionType)]
        given = *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items(), *names.items(), *cells
        consts = function.__code__.co_consts
        documented = bool(consts) and isinstance(consts[0], str) and consts[0] == function.__doc__
        own = _parts(function.__code__.replace(co_consts=consts[1:] if documented else consts))
        found[id(function)] = function, (function.__qualname__, own, [repr(v) for v in given if _is_plain(v)])
    return _digest(sorted((told for _, told in found.values()), key=repr))


def _parts(value: object) -> object:
    if isinstance(value, types.CodeType):
        return value.co_code, value.co_names, value.co_varnames, value.co_freevars, _parts(value.co_consts)
    if isinstance(value, tuple):
        return tuple(_parts(part) for part in value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def _named_by(function: types.FunctionType) -> dict[str, object]:
    """Plain values and functions of its own module that a function names, and does not set."""
    if _home(function) in _OTHERS:
        return {}
    codes = _inner(function.__code__)
    changed = {i.argval for code in codes for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}
    names = {name for code in codes for name in code.co_names} - changed
    found = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}

    def is_own(value: object) -> bool:
        inner = _plain_function(value)
        return isinstance(inner, types.FunctionType) and inner.__globals__ is function.__globals__

    # a path is that of a machine
    kept = {name: value for name, value in found.items() if not name.startswith("__") and not isinstance(value, Path)}
    return {name: value for name, value in kept.items() if _is_plain(value) or is_own(value)}


def _inner(code: types.CodeType) -> list[types.CodeType]:
    """A function's code, and that of functions in it."""
    return [code, *(c for const in code.co_consts if isinstance(const, types.CodeType) for c in _inner(const))]


FRAMEWORK = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _plain(module: nn.Module) -> str:
    """Sixteen hexadecimal digits of the numbers, strings and the like that a module and its submodules have."""
    found = []
    for name, part in module.named_modules():
        own = {key: value for key, value in vars(part).items() if key not in FRAMEWORK and _is_plain(value)}
        found.append((name, _class(type(part)), sorted((key, repr(value)) for key, value in own.items())))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str, *_NAMED))
