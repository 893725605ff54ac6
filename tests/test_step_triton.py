"""The Triton step against the reference: the same table on a CUDA device and, without one, in Triton's interpreter.

Triton decides when it is first imported whether its kernels are interpreted, for the whole process, and other tests may
want it compiled. So ``test_in_the_interpreter`` runs this file once more, in a process of its own that has the variable
set from the start; the tests of the table run there, or where there is a CUDA device, and skip elsewhere.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equifast import reference, rng

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

if INTERPRETED or (importlib.util.find_spec("triton") is not None and torch.cuda.is_available()):
    import triton
    import triton.language as tl

    from equifast import _step_triton

    @triton.jit
    def _box_muller_kernel(
        first: tl.tensor,  # (count,) int64
        second: tl.tensor,  # (count,) int64
        normals: tl.tensor,  # (2, count) float32
        count: tl.tensor,
        SIZE: tl.constexpr,
    ) -> None:
        lane = tl.arange(0, SIZE)
        words = tl.load(first + lane, mask=lane < count, other=0).to(tl.uint32)
        turns = tl.load(second + lane, mask=lane < count, other=0).to(tl.uint32)
        cosine, sine = _step_triton._box_muller(words, turns)
        tl.store(normals + lane, cosine, mask=lane < count)
        tl.store(normals + count + lane, sine, mask=lane < count)


def runs(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of the table."""
    if not INTERPRETED:
        skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
        test = pytest.mark.gpu(skip(test))
    # numpy, which computes for the interpreter, warns where a kernel meets NaN or infinity as it should
    return needs_triton(pytest.mark.filterwarnings("ignore::RuntimeWarning")(test))


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter() -> None:
    # -P: "-m" would put the working directory on the path, and the repository's root must stay off it
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout


# A driver that knows its target and nothing else: kernels are compiled, down to the machine's code, and not launched.
COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Driver())
from equifast import _step_triton

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *args, **options: print(self.kernel.warmup(*args, grid=grid, **options).asm["ptx"])

for name in ("_norm_kernel", "_combine_kernel", "_step_kernel"):
    setattr(_step_triton, name, Compiled(getattr(_step_triton, name)))
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for sigma, word in ((0, 1), (0.5, 2**32 - 1), (torch.tensor(0.5), torch.tensor(3))):
        x = torch.zeros(2, 3, 16, 16, dtype=dtype)
        _step_triton.signed_step(x, x, x, 0.1, 0.1, sigma, word, torch.zeros(2, dtype=torch.int64), 1, word)
"""


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_compiles_without_a_device(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", "-W", "error::UserWarning", "-c", COMPILE]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count(".target sm_90") == 27
    assert "ld.global.v4.b32" in child.stdout  # 16-byte loads
    assert not re.search(r"\batom\.|\bred\.global|\bld\.local", child.stdout)  # no atomics, no table for huge angles


# Absolute tolerance per dtype, values in [0, 1]: one rounding of the result. The interpreter truncates to bfloat16
# where the hardware rounds.
DTYPES = {torch.float32: 1e-7, torch.float64: 1e-15, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SHAPES = [(1, 1, 1, 1), (3, 3, 5, 7), (2, 3, 33, 17), (1, 2, 1, 9), (1, 3, 48, 64)]  # the last: several chunks


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of signed_step, in order."""
    generator = torch.Generator().manual_seed(0)
    x, origin = (torch.rand(shape, generator=generator).to(dtype) for _ in range(2))
    gradient = torch.randn(shape, generator=generator).to(dtype)
    origin = (x + 0.2 * (origin - 0.5)).clamp(0, 1)
    settings = {"eps": 0.06, "step": 0.031, "sigma": 0.5, "seed": 7}
    return dict(x=x, gradient=gradient, origin=origin, **settings, ids=torch.arange(shape[0]), draw=3, t=5)


def moved(arguments: dict[str, Any], to: str) -> dict[str, Any]:
    return {name: value.to(to) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def run(arguments: dict[str, Any]) -> Tensor:
    return _step_triton.signed_step(**moved(arguments, DEVICE))


def direction(arguments: dict[str, Any]) -> Tensor:
    """What the reference takes the sign of."""
    a, g = arguments, arguments["gradient"]
    result = reference.unit(g.to(torch.float64 if g.dtype == torch.float64 else torch.float32)).double()
    if isinstance(a["sigma"], Tensor) or a["sigma"] != 0:
        noise = rng.normal(a["seed"], int(rng.Stream.NOISE), a["ids"], a["draw"], a["t"], g[0].numel())
        result = result + a["sigma"] * noise.view(g.shape)
    return result


def agree(arguments: dict[str, Any]) -> None:
    expected, actual = reference.signed_step(**arguments), run(arguments).cpu()
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    # Rounding may turn the sign of what is next to nothing; what is nothing has none to turn.
    size = direction(arguments).abs()
    unsure = (size > 0) & (size < 1e-5) & (arguments["sigma"] != 0)
    assert unsure.sum() <= 2 + 1e-3 * unsure.numel()
    tolerance = DTYPES[expected.dtype]
    actual = torch.where(unsure, expected, actual)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0, equal_nan=True)


@runs
@pytest.mark.parametrize("sigma", [0, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees(dtype: torch.dtype, shape: tuple[int, ...], sigma: float | Tensor) -> None:
    agree({**inputs(shape, dtype), "sigma": sigma})


SETTINGS: dict[str, dict[str, Any]] = {
    "ids": {"ids": torch.tensor([2**32 + 5, -1, -(2**40)])},
    "extreme-ids": {"ids": torch.tensor([2**63 - 1, -(2**63), 2**31])},
    "strided-ids": {"ids": torch.arange(6)[::2]},
    "seed": {"seed": 2**32 - 1},
    "seed-one": {"seed": 1, "draw": 1, "t": 1},
    "seed-half": {"seed": 2**31},
    "last": {"seed": 2**32 - 1, "draw": 65535, "t": 65535},
    "tensors": {
        "seed": torch.tensor(2**32 - 1),
        "draw": torch.tensor(65535),
        "t": torch.tensor(65535),
        "step": torch.tensor(0.02, dtype=torch.float64),
        "sigma": torch.tensor(0.7),
    },
    "int32-tensors": {"seed": torch.tensor(9, dtype=torch.int32), "t": torch.tensor(65535, dtype=torch.int32)},
    "no-noise": {"sigma": 0.0},
    "noise-of-a-tensor": {"sigma": torch.tensor(0.5)},
    "no-noise-of-a-tensor": {"sigma": torch.tensor(0.0, dtype=torch.float64)},
    "small-ball": {"eps": 1e-3},
    "integers": {"eps": 1, "step": 1, "sigma": 1},
    "step-zero": {"step": 0.0},
    "step-back": {"step": -0.02},
}


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, dtype: torch.dtype) -> None:
    agree({**inputs((3, 3, 5, 7), dtype), **SETTINGS[name]})


def _scaled(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda g: g * scale


def _with(value: float) -> Callable[[Tensor], Tensor]:
    return lambda g: g.index_put((torch.tensor(1), torch.tensor(2), torch.tensor(3)), torch.tensor(value))


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": _scaled(0.0),
    "tiny": _scaled(1e-38),
    "subnormal": _scaled(1e-42),
    "huge": _scaled(1e30),
    "largest": lambda g: g / g.abs().max() * 3.4e38,
    "one": lambda g: torch.where(g == g.max(), g, 0.0),
    "nan": _with(torch.nan),
    "infinity": _with(torch.inf),
    "all-nan": lambda g: torch.full_like(g, torch.nan),
}


@runs
@pytest.mark.parametrize("sigma", [0, 0.01])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str, sigma: float) -> None:
    arguments = {**inputs((2, 3, 33, 65)), "sigma": sigma}  # two chunks of the norm
    agree({**arguments, "gradient": GRADIENTS[name](arguments["gradient"])})


@runs
def test_norm_of_a_large_image() -> None:
    """More partial results than are combined at a time, of very different magnitudes; (1000, 4099) in float64."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(1000, 4099, generator=generator, dtype=torch.float64)
    g = (g * torch.logspace(-30, -20, 1000, dtype=torch.float64)[:, None]).flatten()
    partial = torch.empty(1, triton.cdiv(len(g), 4096), 2, device=DEVICE)
    _step_triton._norm_kernel[partial.shape[1:2]](
        g.float().to(DEVICE), partial, len(g), partial.shape[1], TINY=2.0**-126, BLOCK=4096, enable_fp_fusion=True
    )
    scale = torch.full((1, 2), torch.nan, device=DEVICE)
    for block in (256, 1024):
        _step_triton._combine_kernel[(1,)](
            partial, scale, partial.shape[1], TINY=2.0**-126, BLOCK=block, enable_fp_fusion=True
        )
        largest, norm = scale[0].double().cpu()
        torch.testing.assert_close(largest, g.abs().max(), rtol=1e-7, atol=0)
        torch.testing.assert_close(norm, g.norm() / g.abs().max(), rtol=1e-6, atol=0)


@runs
@pytest.mark.parametrize("name", ["x", "origin"])
def test_what_is_not_a_number_shows(name: str) -> None:
    arguments = inputs((2, 3, 5, 7))
    for value in (torch.nan, torch.inf, -torch.inf):
        agree({**arguments, name: _with(value)(arguments[name])})


@runs
def test_noise_to_1e_5() -> None:
    """Against a gradient that all but cancels the noise: what is left decides the sign of every element."""
    arguments = inputs((2, 3, 63, 65))
    x = torch.full_like(arguments["x"], 0.5)
    ids, key = torch.tensor([3, 2**33]), (7, int(rng.Stream.NOISE))
    noise = rng.normal(*key, ids, 3, 5, x[0].numel()).view(x.shape)
    for left in (1e-5, -1e-5):
        gradient = left - noise
        for n in range(2):  # the norm is an image's own
            norm = gradient[n].norm()
            one = {**arguments, "x": x[:1], "origin": x[:1], "gradient": gradient[n : n + 1].float(), "eps": 0.1}
            result = run({**one, "ids": ids[n : n + 1], "sigma": 1 / norm.item(), "step": 0.05}).cpu()
            assert torch.equal(result, torch.full_like(result, 0.5 + 0.05 * (1 if left > 0 else -1)))


@runs
def test_box_muller_at_its_ends() -> None:
    """Words that no test would meet by chance: u next to 0, 1/2 and 1, and next to every eighth of a turn."""
    words = [(eighth * 2**29 + near) % 2**32 for eighth in range(9) for near in (-129, -2, -1, 0, 1, 2, 129)]
    first, second = (side.flatten() for side in torch.meshgrid(*[torch.tensor(words)] * 2, indexing="ij"))
    normals = torch.full((2, len(first)), torch.nan, device=DEVICE)
    _box_muller_kernel[(1,)](first.to(DEVICE), second.to(DEVICE), normals, len(first), SIZE=4096, enable_fp_fusion=True)
    u, angle = (first.double() + 0.5) / 2**32, (second.double() + 0.5) * (2 * torch.pi / 2**32)
    radius = (-2 * u.log()).sqrt()
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()))
    torch.testing.assert_close(normals.cpu().double(), expected, atol=2e-6, rtol=0)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def strided(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor + 1), -1).flatten(3)[..., ::2]


def off_boundary(tensor: Tensor) -> Tensor:
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


LAYOUTS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "channels-last": {"x": channels_last, "gradient": channels_last, "origin": channels_last},
    "channels-last-x": {"x": channels_last},
    "channels-last-gradient": {"gradient": channels_last},
    "strided": {"x": strided, "gradient": strided, "origin": strided},
    "off-boundary": {"x": off_boundary, "gradient": off_boundary, "origin": off_boundary},
    "expanded": {"origin": lambda tensor: tensor[:, :1].expand_as(tensor)},
}


@runs
@pytest.mark.parametrize("sigma", [0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, sigma: float) -> None:
    arguments = {**inputs((2, 3, 4, 8), dtype), "sigma": sigma}
    agree({**arguments, **{name: change(arguments[name]) for name, change in LAYOUTS[layout].items()}})


@runs
@pytest.mark.parametrize("shape", [(5, 3, 33, 43), (5, 3, 32, 44)], ids=str)
def test_an_image_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    arguments = {**inputs(shape), "ids": torch.tensor([4, 1, 2**35, -3, 0]), "sigma": 0.02}
    whole = run(arguments).cpu()
    rows = ("x", "gradient", "origin", "ids")
    for part in (slice(0, 1), slice(1, 2), slice(1, 4), slice(4, 5)):
        on_device = moved(arguments, DEVICE)  # slices of what lies there, so that they start anywhere
        assert torch.equal(run({**on_device, **{name: on_device[name][part] for name in rows}}).cpu(), whole[part])


@runs
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    result = run({**inputs(shape), "eps": 0.1})
    assert result.shape == shape


@runs
def test_leaves_its_inputs_alone() -> None:
    arguments = moved(inputs((2, 3, 5, 7)), DEVICE)
    kept = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    for name in ("x", "gradient", "origin"):
        arguments[name].requires_grad_()
    assert not run(arguments).requires_grad
    assert all(torch.equal(arguments[name], value) for name, value in kept.items())


BAD: dict[str, dict[str, Any]] = {
    "x-rank": {"x": torch.zeros(3, 4, 5)},
    "x-integer": {"x": torch.zeros(2, 3, 4, 5, dtype=torch.int64)},
    "gradient-none": {"gradient": None},
    "gradient-shape": {"gradient": torch.zeros(2, 3, 4, 4)},
    "origin-shape": {"origin": torch.zeros(1, 3, 4, 5)},
    "eps-zero": {"eps": 0.0},
    "eps-text": {"eps": "1"},
    "ids-count": {"ids": torch.arange(3)},
    "ids-dtype": {"ids": torch.zeros(2)},
}


@runs
@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_the_reference_s_sentence(name: str) -> None:
    arguments = moved({**inputs((2, 3, 4, 5)), **BAD[name]}, DEVICE)
    with pytest.raises((TypeError, ValueError)) as expected:
        reference.signed_step(**arguments)
    with pytest.raises(expected.type) as actual:
        run(arguments)
    assert str(actual.value) == str(expected.value)


@runs
@pytest.mark.parametrize("name", ["step", "sigma", "seed", "draw", "t"])
def test_a_scalar_has_no_dimension(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} has shape \(1,\); it must be a number or a 0-d tensor"):
        run({**inputs((2, 3, 4, 5)), name: torch.ones(1)})


on_cuda = pytest.mark.skipif(INTERPRETED, reason="this is about the device")


@runs
@on_cuda
def test_numbers_in_host_memory_serve_too() -> None:
    arguments = inputs((2, 3, 5, 7))
    scalars = {"sigma": torch.tensor(0.5), "step": torch.tensor(0.031), "seed": torch.tensor(7), "t": torch.tensor(5)}
    actual = _step_triton.signed_step(**{**moved(arguments, DEVICE), **scalars})
    assert torch.equal(actual, run(arguments))


@runs
@on_cuda
def test_replays_of_a_captured_graph() -> None:
    arguments = moved(inputs((2, 3, 33, 17)), DEVICE)
    settings = {"sigma": 0.5, "step": 0.031, "seed": 7, "draw": 3, "t": 5}
    arguments |= {name: torch.tensor(value, device=DEVICE) for name, value in settings.items()}
    run(arguments)  # compiles, which a capture does not allow
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(arguments)
    seen: list[Tensor] = []
    for t, sigma, step in ((5, 0.5, 0.031), (6, 0.5, 0.031), (65535, 0.01, 0.02)):
        for name, value in (("t", t), ("sigma", sigma), ("step", step)):
            arguments[name].fill_(value)
        graph.replay()
        assert torch.equal(result, run({**arguments, "t": t, "sigma": sigma, "step": step}))
        assert all(not torch.equal(result, other) for other in seen)
        seen.append(result.clone())


@runs
@on_cuda
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("this takes 40 GiB of the device's memory")
    x = torch.rand(3, 1, 28_000, 28_000, dtype=torch.float16, device=DEVICE)
    gradient = torch.randn_like(x)
    arguments = {**inputs((3, 1, 1, 1)), "x": x, "gradient": gradient, "origin": x}
    last = {name: arguments[name][2:] for name in ("x", "gradient", "origin", "ids")}
    assert torch.equal(run(arguments)[2:], run({**arguments, **last}))
