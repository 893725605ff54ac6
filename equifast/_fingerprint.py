"""What tells the weights of one model from those of another."""

import dataclasses
import functools
import hashlib
import inspect
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

__all__ = ["FRAMEWORK", "Known", "describe", "fingerprint", "stamp", "tensors_of", "weights"]


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


def stamp(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """What changes when weights of a module are changed in place or replaced; it does not look at them."""
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors_of(module))


Known = dict[int, tuple[object, Any]]
"""Modules by id, and what was told of each: their weights are read once."""


def describe(thing: object, known: Known | None = None, seen: tuple[int, ...] = ()) -> Any:
    """What decides the results of an attack, a defense, a view or whatever, as values that JSON can hold.

    Of modules the class, the weights, and plain attributes of them and of their submodules; of other objects, users'
    classes among them, all attributes; of functions the code, what they close over, their defaults, and plain values
    and functions of their own module that they name. Of classes that are neither Python's, PyTorch's nor ours the code
    of the methods counts too. An object may tell by itself, with ``_described()``. ``known`` may be given to calls that
    follow each other.
    """
    known = {} if known is None else known
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if id(thing) in seen:
        return type(thing).__qualname__
    seen = (*seen, id(thing))
    if isinstance(thing, type):
        return _class(thing)
    if callable(own := getattr(thing, "_described", None)):
        return describe(own(), known, seen)
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
        inner = [_content(cell) for cell in thing.__closure__ or ()]
        given = [inner, thing.__defaults__ or [], thing.__kwdefaults__ or {}, _named_by(thing)]
        told = {"given": describe(given, known, seen)} if any(given) else {}
        return {"function": thing.__qualname__, "code": _code(thing.__code__), **told}
    if callable(thing) and (inner := inspect.unwrap(thing)) is not thing:  # a cached function
        return describe(inner, known, seen)
    names = set(getattr(thing, "__dict__", ()))
    if dataclasses.is_dataclass(thing):
        names |= {field.name for field in dataclasses.fields(thing)}  # which may lie in slots
    home = type(thing).__module__
    if not names or (home.partition(".")[0] in sys.stdlib_module_names and home != "__main__"):
        return getattr(thing, "__qualname__", _class(type(thing)))  # a builtin, a lock, a logger
    attributes = {name: describe(getattr(thing, name), known, seen) for name in sorted(names) if name != "_cheap"}
    return {"class": _class(type(thing)), **attributes}


_OTHERS = frozenset(("torch", "equifast", "builtins"))  # whose versions are told apart from these


def _home(thing: Any) -> str:
    """The package that something comes from."""
    return str(getattr(thing, "__module__", None) or "builtins").partition(".")[0]


def _class(kind: type) -> str:
    """Its name, and where its methods are a user's sixteen hexadecimal digits of their code."""
    own = [k for k in kind.__mro__ if _home(k) not in _OTHERS and _home(k) not in sys.stdlib_module_names - _MAIN]
    codes = [
        (name, _code(function.__code__))
        for k in own
        for name, value in sorted(vars(k).items())
        if isinstance(function := _plain_function(value), types.FunctionType)
    ]
    digest = hashlib.sha256(repr(codes).encode()).hexdigest()[:16]
    return f"{kind.__qualname__} {digest}" if codes else kind.__qualname__


_MAIN = frozenset(("__main__",))


def _plain_function(value: object) -> object:
    """The function in a method, class method, static method or property, without what decorates it."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    value = value.fget if isinstance(value, property) else getattr(value, "func", value)  # of a cached one
    return inspect.unwrap(value) if callable(value) else value


def _code(code: types.CodeType) -> str:
    """Sixteen hexadecimal digits of what a function does, wherever it stands in its file."""
    return hashlib.sha256(repr(_parts(code)).encode()).hexdigest()[:16]


def _parts(value: object) -> object:
    if isinstance(value, types.CodeType):
        return value.co_code, value.co_names, value.co_varnames, value.co_freevars, _parts(value.co_consts)
    if isinstance(value, tuple):
        return tuple(_parts(part) for part in value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def _named_by(function: types.FunctionType) -> dict[str, object]:
    """Plain values and functions of its own module that a function names."""
    if _home(function) in _OTHERS:
        return {}
    names = {name for code in _inner(function.__code__) for name in code.co_names}
    found = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    return {
        name: value
        for name, value in found.items()
        if (_is_plain(value) and not name.startswith("__"))
        or (isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__)
    }


def _inner(code: types.CodeType) -> list[types.CodeType]:
    """A function's code, and that of functions in it."""
    return [code, *(c for const in code.co_consts if isinstance(const, types.CodeType) for c in _inner(const))]


_NAMED = (torch.dtype, torch.device, torch.memory_format, Path, Enum, range, bytes, complex, slice, Fraction, Decimal)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


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
