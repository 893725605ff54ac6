"""Models, defenses and images from outside: what the command line can load and read."""

import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from equifast import demo
from equifast._files import replacing
from equifast.evaluate.data import SUFFIXES, first_line, upright
from equifast.purifier import Defended, DefendedModel

__all__ = [
    "SUFFIXES",
    "Normalized",
    "find_images",
    "first_line",
    "load_defense",
    "load_model",
    "read_image",
    "write_image",
]


class Normalized(nn.Module):
    """A model that takes images in [0, 1] and subtracts ``mean`` and divides by ``std``, per channel, itself."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.model((x - self.get_buffer("mean")) / self.get_buffer("std"))


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_model(spec: str) -> nn.Module:
    """A model in eval mode that takes images in [0, 1].

    Args:
        spec: ``"demo"``; ``"torchvision:NAME"`` (its default weights) or ``"torchvision:NAME:WEIGHTS"`` (``none`` for
            random ones);
            ``"timm:NAME"`` (pretrained); or ``"file.py:function"``, a function without arguments that returns the
            model, normalization inside.

    Raises:
        ValueError: if the model cannot be had, in one sentence.
    """
    kind, _, rest = spec.partition(":")
    if spec == "demo":
        return demo.load_model()
    if kind == "torchvision" and rest:
        name, _, weights = rest.partition(":")
        return _torchvision(name, weights or "DEFAULT").eval()
    if kind == "timm" and rest:
        return _timm(rest).eval()
    if (place := function_in(spec)) is not None:
        path, function = place
        model = _from_file("model", path, function)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{function!r} in {str(path)!r} returned a {type(model).__name__}; it must be a Module")
        return model.eval()
    raise ValueError(f"model is {spec!r}; it must be demo, torchvision:NAME[:WEIGHTS], timm:NAME or file.py:function")


def load_defense(spec: str, model: nn.Module) -> DefendedModel:
    """A model with a defense of the user's inside.

    Args:
        spec: ``"file.py:function"``, a function that takes the model and returns a :class:`DefendedModel`, or what
            :class:`Defended` takes for a purifier: ``(x, ids=None, draw=0) -> x``.
        model: takes images in [0, 1].

    Raises:
        ValueError: if the defense cannot be had, in one sentence.
    """
    place = function_in(spec)
    if place is None:
        raise ValueError(f"defense is {spec!r}; it must be file.py:function")
    path, function = place
    found = _from_file("defense", path, function, model)
    if isinstance(found, DefendedModel):
        return found
    if isinstance(found, nn.Module) or not callable(found):
        kind = type(found).__name__
        raise ValueError(
            f"{function!r} in {str(path)!r} returned a {kind}; it must be a DefendedModel, such as "
            "equifast.Defended(model, purifier), or a purifier that is no Module"
        )
    return Defended(model, found)


def function_in(spec: str) -> tuple[Path, str] | None:
    """The file and the name of ``file.py:function``; None where it is something else."""
    path, _, function = spec.rpartition(":")
    return (Path(path), function) if path.endswith(".py") else None


def _torchvision(name: str, weights: str) -> nn.Module:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
        raise ValueError(f"torchvision cannot be used: {first_line(error)}") from error
    if name not in models.list_models():
        near = difflib.get_close_matches(name, models.list_models(), n=3)
        raise ValueError(f"torchvision has no model {name!r}" + (f"; near are {', '.join(near)}" if near else ""))
    known = models.get_model_weights(name).__members__
    if weights not in ("none", *known):
        raise ValueError(f"torchvision model {name!r} has no weights {weights!r}; it has {', '.join(known)} and none")
    mean, std = _IMAGENET
    chosen = None if weights == "none" else known[weights]
    extra: dict[str, Any] = {}
    if chosen is not None:
        transform = chosen.transforms()
        mean, std = (tuple(getattr(transform, key, default)) for key, default in (("mean", mean), ("std", std)))
    elif "segmentation" in models.get_model_builder(name).__module__:
        extra["weights_backbone"] = None  # or those would be downloaded
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # weights that are asked to be random are the same each time
            model = models.get_model(name, weights=chosen, **extra)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"torchvision model {name!r} cannot be loaded: {first_line(error)}") from error
    return Normalized(model, mean, std)


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"timm cannot be used: {first_line(error)}") from error
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm and its hub client raise many kinds
        raise ValueError(f"timm model {name!r} cannot be loaded: {first_line(error)}") from error
    config: Any = model.pretrained_cfg
    return Normalized(model, tuple(config["mean"]), tuple(config["std"]))


class _Source(SourceFileLoader):
    """Reads the file as it is: bytecode that Python keeps would be taken for a later file of its second and size."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _from_file(what: str, path: Path, function: str, *arguments: object) -> object:
    """What a function in a user's file returns."""
    if not path.is_file():
        raise ValueError(f"{what} file {str(path)!r} does not exist")
    name = f"_equifast_{what}_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and pickle look it up there
    sys.path.insert(0, str(path.parent.resolve()))  # as if it were run: modules beside it can be imported
    try:
        specification.loader.exec_module(module)
        build: Callable[..., object] | None = getattr(module, function, None)
        if build is None:
            raise ValueError(f"it has no function {function!r}")
        return build(*arguments)
    except Exception as error:  # it is the user's code
        raise ValueError(f"{what} file {str(path)!r} failed: {first_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))


def find_images(paths: list[Path], output: Path | None = None) -> Iterator[tuple[Path, Path]]:
    """Pairs of an image file and its name below the output folder: PNG, JPEG and WebP, folders in sorted order.

    What lies in ``output`` is left out where the folder around it is searched.

    Raises:
        ValueError: if a path does not exist.
    """
    written = None if output is None else output.resolve()
    for path in paths:
        if path.is_dir():
            inside = written is not None and path.resolve() in written.parents
            for file in sorted(path.rglob("*")):
                if inside and written in file.resolve().parents:
                    continue
                if file.suffix.lower() in SUFFIXES and file.is_file():
                    yield file, file.relative_to(path)
        elif path.is_file():
            yield path, Path(path.name)
        else:
            raise ValueError(f"{str(path)!r} does not exist")


def read_image(path: Path) -> Tensor:
    """An image file of 8 bits per channel as (3, H, W) float32 in [0, 1], upright; transparency is dropped.

    Raises:
        OSError: if the file cannot be read as such an image.
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(upright(image))).permute(2, 0, 1).float() / 255
    except OSError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files, struct.error among them
        raise OSError(first_line(error)) from error


def write_image(path: Path, image: Tensor) -> None:
    """Write (3, H, W) in [0, 1] as an 8-bit PNG: beside first, then renamed, so that no half file is left."""
    pixels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        Image.fromarray(pixels).save(beside, format="PNG")
