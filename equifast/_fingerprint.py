"""What tells the weights of one model from those of another."""

import dataclasses
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

__all__ = ["Known", "describe", "fingerprint", "stamp", "tensors_of"]


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


def stamp(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """What changes when weights of a module are changed in place or replaced; it does not look at them."""
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors_of(module))


Known = dict[int, tuple[object, Any]]
"""Modules by id, and what was told of each: their weights are read once."""


def describe(thing: object, known: Known | None = None, seen: tuple[int, ...] = ()) -> Any:
    """What decides the results of an attack, a defense, a view or whatever, as values that JSON can hold.

    Of modules the class, the weights, and plain attributes of them and of their submodules; of other objects, users'
    classes among them, all attributes; of functions the name, what they close over and their defaults. An object may
    tell by itself, with ``_described()``. ``known`` may be given to calls that follow each other.
    """
    known = {} if known is None else known
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if id(thing) in seen:
        return type(thing).__qualname__
    seen = (*seen, id(thing))
    if isinstance(thing, type):
        return thing.__qualname__
    if callable(own := getattr(thing, "_described", None)):
        return describe(own(), known, seen)
    if isinstance(thing, Tensor):
        return {"tensor": fingerprint([thing])}
    if isinstance(thing, nn.Module):
        if id(thing) not in known:
            told = {"tensors": fingerprint(tensors_of(thing)), "settings": _plain(thing)}
            known[id(thing)] = thing, {"class": type(thing).__qualname__, **told}
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
        given = [inner, thing.__defaults__ or [], thing.__kwdefaults__ or {}]
        return (
            {"function": thing.__qualname__, "given": describe(given, known, seen)}
            if any(given)
            else thing.__qualname__
        )
    names = set(getattr(thing, "__dict__", ()))
    if dataclasses.is_dataclass(thing):
        names |= {field.name for field in dataclasses.fields(thing)}  # which may lie in slots
    home = type(thing).__module__
    if not names or (home.partition(".")[0] in sys.stdlib_module_names and home != "__main__"):
        return getattr(thing, "__qualname__", type(thing).__qualname__)  # a builtin, a lock, a logger
    attributes = {name: describe(getattr(thing, name), known, seen) for name in sorted(names) if name != "_cheap"}
    return {"class": type(thing).__qualname__, **attributes}


_NAMED = (torch.dtype, torch.device, torch.memory_format, Path, Enum, range, bytes, complex, slice, Fraction, Decimal)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _plain(module: nn.Module) -> str:
    """Sixteen hexadecimal digits of the numbers, strings and the like that a module and its submodules have."""
    found = []
    for name, part in module.named_modules():
        public = {key: value for key, value in vars(part).items() if not key.startswith("_") and key != "training"}
        found.append((name, type(part).__qualname__, sorted((k, repr(v)) for k, v in public.items() if _is_plain(v))))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str, *_NAMED))
