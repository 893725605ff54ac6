"""What evaluations keep: a line for each image and cell, written at once, in an order that the data decide."""

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from equifast._files import replacing
from equifast.evaluate.metrics import confusion

__all__ = [
    "CLEAN",
    "Advance",
    "Clock",
    "Image",
    "Part",
    "Records",
    "as_aimed",
    "as_array",
    "batches",
    "judged",
    "list_images",
    "listed",
]

Array = NDArray[Any]
Advance = Callable[[str, float, float], object]
"""Called as ``(what, done, total)``: what is under way, and seconds of work, of which the total is an estimate."""

CLEAN = "clean"


@dataclass(frozen=True)
class Image:
    key: str  # of the image and its label, whatever its place in the data
    id: int
    index: int
    shape: tuple[int, ...]
    digest: str = ""  # of the image alone
    label: int | None = None  # where it has one


def list_images(data: Dataset[Any]) -> list[Image]:
    """The images of a data set in an order of their own: that of the digests of image and label."""
    found, seen = [], dict[str, int]()
    for index in range(len(cast(Sized, data))):
        x, y = item(data, index)
        alone, key = _digests(x, y)
        again = seen[key] = seen.get(key, -1) + 1
        name = key if not again else f"{key}-{again}"
        found.append(Image(name, int(key[:15], 16), index, tuple(x.shape), alone, int(y) if y.dim() == 0 else None))
    if not found:
        raise ValueError("data has no images; there must be at least one")
    return sorted(found, key=lambda image: image.key)


def _digests(x: Tensor, y: Tensor) -> tuple[str, str]:
    """Of an image alone, and of image and label."""
    digest, found = hashlib.sha256(), []
    for tensor in (x, y):
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append(digest.hexdigest()[:16])
    return found[0], found[1]


def listed(data: Dataset[Any], image: Image) -> tuple[Tensor, Tensor]:
    """Image and label as they were when they were listed; ValueError where the data gives others now."""
    x, y = item(data, image.index)
    if _digests(x, y)[1] != image.key.partition("-")[0]:
        raise ValueError(f"data gives another image or label at {image.index} than before; it must always be the same")
    return x, y


def item(data: Dataset[Any], index: int) -> tuple[Tensor, Tensor]:
    """Image and label, checked."""
    x, y = data[index][:2]
    y = torch.as_tensor(y)
    if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point():
        got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"data has an image that is {got}; it must be (3, H, W), floating point, in [0, 1]")
    if y.dtype != torch.int64 or y.dim() not in (0, 2):
        raise ValueError(f"data has a label {tuple(y.shape)} of {y.dtype}; it must be a number or (H, W), int64")
    return x, y


def batches(images: Sequence[Image], count: int) -> Iterator[list[Image]]:
    """Images of one shape at a time, at most so many."""
    batch: list[Image] = []
    for image in sorted(images, key=lambda image: image.shape):
        if batch and (len(batch) == count or batch[0].shape != image.shape):
            yield batch
            batch = []
        batch.append(image)
    yield batch


def judged(prediction: Tensor, y: Tensor, classes: int, ignore_index: int = 255) -> list[Any]:
    """What is recorded of the predictions for each image: its label, or the pixels of its confusion matrix."""
    if y.dim() == 1:
        return [{"label": int(a), "predicted": int(b)} for a, b in zip(y, prediction, strict=True)]
    matrices = confusion(prediction, y, classes, ignore_index)
    return [
        {"classes": classes, "pixels": [[int(i), int(j), int(m[i, j])] for i, j in np.argwhere(m)]} for m in matrices
    ]


class Clock:
    """Tells how long the rest takes, from what each cell took so far.

    One not yet seen costs, by its ``effort``, as much as those that were, of its own row where there are any.
    """

    def __init__(
        self,
        missing: dict[tuple[str, str], int],
        progress: Advance | None,
        effort: Mapping[tuple[str, str], float] | None = None,
    ) -> None:
        self._missing, self._progress, self._effort = dict(missing), progress, effort or {}
        self._spent: dict[tuple[str, str], tuple[float, int]] = {}

    def done(self, cell: tuple[str, str], images: int, seconds: float) -> None:
        before, count = self._spent.get(cell, (0.0, 0))
        self._spent[cell] = before + seconds, count + images
        self._missing[cell] -= images
        if self._progress is None:
            return
        spent = sum(seconds for seconds, _ in self._spent.values())
        each = {c: seconds / count for c, (seconds, count) in self._spent.items()}
        rest = sum((each[c] if c in each else self._guess(c, each)) * count for c, count in self._missing.items())
        self._progress(" / ".join(cell), spent, spent + rest)

    def _guess(self, cell: tuple[str, str], each: Mapping[tuple[str, str], float]) -> float:
        seen = [c for c in each if c[0] == cell[0]] or list(each)
        return sum(each[c] for c in seen) * self._effort.get(cell, 1.0) / sum(self._effort.get(c, 1.0) for c in seen)


@dataclass(frozen=True)
class Part:
    """One of several processes that evaluate together, each every ``parts``-th batch; ``number`` from 0."""

    number: int
    parts: int


class Records:
    """``study.json``, what is evaluated, and ``records.jsonl``, a line for each image and cell that is done.

    A part of an evaluation writes a file of its own beside, which who opens the folder next as a whole takes over. From
    its opening until it is left it holds ``study.lock``, a part its own file: who else wants them is refused.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], part: Part | None = None) -> None:
        self._manifest = json.loads(json.dumps(manifest))
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._path = folder, folder / "records.jsonl"
        self.results: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._held: list[Callable[[], object]] = []
        try:
            self._hold(folder / "study.lock", shared=part is not None)
            self._open(part)
        except BaseException:
            self._release()
            raise

    def _open(self, part: Part | None) -> None:
        lines, end = self._read(self._path)
        if part is not None:
            self._path = self._folder / f"records-{part.number + 1}-of-{part.parts}.jsonl"
            self._hold(self._path)
            _, end = self._read(self._path)
        others = sorted(self._folder.glob("records-*-of-*.jsonl")) if part is None else []
        for other in others:
            lines += self._read(other)[0]
        self._compare(write=part is None)
        if others:
            _replace(self._path, b"".join(lines))
        elif self._path.exists() and self._path.stat().st_size > end:
            os.truncate(self._path, end)
        for other in others:
            other.unlink()

    def _hold(self, path: Path, shared: bool = False) -> None:
        """Until it is left, or its process ends; ValueError where another has it."""
        try:
            import fcntl
        except ImportError:  # no Unix
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._held.append(weakref.finalize(self, os.close, descriptor))
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            what = path.parent if path.suffix == ".lock" else path
            raise ValueError(f"{what} is being written by another process; wait for it, or stop it") from None
        except OSError:  # a file system without locks
            return

    def _release(self) -> None:
        for release in self._held:
            release()

    def _read(self, path: Path) -> tuple[list[bytes], int]:
        """The lines of a file that are new, and where they end: a run that was killed may have torn the last one."""
        content = path.read_bytes() if path.exists() else b""
        end, found = content.rfind(b"\n") + 1, []
        for text in content[:end].splitlines(keepends=True):
            try:
                line = json.loads(text)
                key = (line["image"], line["defense"], line["attack"])
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(f"{path} has a line that equifast did not write; choose another folder") from None
            if key not in self.results:
                self.results[key] = line
                found.append(text)
        return found, end

    def _compare(self, write: bool) -> None:
        """Refuses results of other data or settings; more attackers and defenses may come."""
        path = self._folder / "study.json"
        now = self._manifest
        if path.exists():
            was = _manifest(path)
            every = bool(self.results) or not write  # a part has them as they were just written
            keys = dict.fromkeys((*now, *was) if every else ())
            changed = [
                f"{key}{_apart(was.get(key), now.get(key))}"
                for key in keys
                if key not in ("attackers", "defenses") and _told(was.get(key)) != _told(now.get(key))
            ]
            seen: dict[str, set[str]] = {"defenses": {defense for _, defense, _ in self.results}}
            seen["attackers"] = {
                name for _, defense, attack in self.results for name in (attack, f"{defense} / {attack}")
            }
            for kind, found in seen.items():  # of others there is only what a run had before it
                changed += [
                    f"{kind[:-1]} {name}{_apart(was[kind].get(name), settings)}"
                    for name, settings in now[kind].items()
                    if (name in found or not write) and _told(was[kind].get(name)) != _told(settings)
                ]
                now[kind] = {name: was[kind][name] for name in was[kind] if name in found} | now[kind]
            if changed:
                raise ValueError(f"{self._folder} holds results of another {', '.join(changed)}; choose another folder")
        elif self.results:
            raise ValueError(f"{self._folder} has records and no study.json; choose another folder")
        if write:
            _replace(path, (json.dumps(now, indent=2) + "\n").encode())

    def __enter__(self) -> "Records":
        self._file = self._path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._release()

    def add(self, lines: Iterator[dict[str, Any]]) -> None:
        found = list(lines)
        content = "".join(json.dumps(line) + "\n" for line in found).encode()
        try:
            written = self._file.write(content)  # one append
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; what {self._path} had is kept") from error
        if written != len(content):
            raise OSError(f"{self._path} took {written} of {len(content)} bytes: the disk is full")
        for line in found:
            self.results[line["image"], line["defense"], line["attack"]] = line


def _manifest(path: Path) -> dict[str, Any]:
    """A ``study.json``, as it was written."""
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(kind), dict) for kind in ("attackers", "defenses")):
        raise ValueError(f"{path} is not as equifast wrote it; choose another folder")
    return found


def _replace(path: Path, content: bytes) -> None:
    """Write a file beside, which takes the place of the one that was there once it is on the disk."""
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _told(value: object) -> str:
    """As it is written: NaN equals itself there."""
    return json.dumps(value, sort_keys=True)


def _apart(was: Any, now: Any) -> str:
    """In what two values of a setting differ, as far as it can be said in a few words."""
    if isinstance(was, dict) and isinstance(now, dict) and set(was) == set(now) == {"images", "digest"}:
        before, after = was["images"], now["images"]
        return f" ({before} images, now {after})" if before != after else f" ({before} images, now as many others)"
    where, was, now = _first_difference(was, now)
    told = [f"{was!r}, now {now!r}"] if not isinstance(was, dict | list) and not isinstance(now, dict | list) else []
    words = ": ".join([*([".".join(where)] if where else []), *told])
    return f" ({words})" if words else ""


def _first_difference(was: Any, now: Any) -> tuple[list[str], Any, Any]:
    """Where two values differ first, and what stands there in each."""
    if isinstance(was, dict) and isinstance(now, dict):
        pairs = {key: (was.get(key), now.get(key)) for key in (*now, *was)}
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = {str(place): pair for place, pair in enumerate(zip(was, now, strict=True))}
    else:
        return [], was, now
    for key, (before, after) in pairs.items():
        if _told(before) != _told(after):
            where, before, after = _first_difference(before, after)
            return [key.lstrip("_"), *where], before, after
    return [], was, now


def as_array(result: Mapping[str, Any]) -> Array:
    if "label" in result:
        return np.asarray(result["label"] == result["predicted"])
    matrix = np.zeros((result["classes"], result["classes"]), np.int64)
    for i, j, count in result["pixels"]:
        matrix[i, j] = count
    return matrix


def as_aimed(result: Mapping[str, Any], target: int) -> Array:
    """The same with the target in place of every true label."""
    if "label" in result:
        return np.asarray(result["predicted"] == target)
    matrix = np.zeros((result["classes"], result["classes"]), np.int64)
    for _, j, count in result["pixels"]:
        matrix[target, j] += count
    return matrix
