import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is loaded: threads that wait by spinning would take the time of the other processes of the suite.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# xdist's; tables are as wide as a test says. The others make what is printed colored wherever it goes.
os.environ.pop("COLUMNS", None)
os.environ.pop("FORCE_COLOR", None)
os.environ.pop("PY_COLORS", None)
os.environ.pop("CLICOLOR_FORCE", None)
os.environ.pop("GITHUB_ACTIONS", None)
os.environ.pop("TTY_COMPATIBLE", None)

import pytest
import torch


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of data for measuring, which is not part of the repository."""
    folder = Path(os.environ.get("EQUIFAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the data sets for measuring (camvid, cifar10) are not here; name their folder in EQUIFAST_DATA")
    return folder


@pytest.fixture(scope="session")
def opencv() -> None:
    """What corruptions need beside pip's packages: the libraries of a desktop, or OpenCV's build without windows."""
    from equifast.evaluate.corruptions import _library

    try:
        _library()
    except RuntimeError as problem:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(problem))


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    """On any machine: with one some convolutions are others (`equifast.features`), which has tests of its own."""
    torch.set_num_threads(2)


@pytest.fixture
def threads() -> Iterator[None]:
    """For a test that changes how many there are."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
