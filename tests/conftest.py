import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of data for measuring, which is not part of the repository."""
    folder = Path(os.environ.get("EQUIFAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the data sets for measuring (camvid, cifar10) are not here; name their folder in EQUIFAST_DATA")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
