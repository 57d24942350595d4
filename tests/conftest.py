"""One torch thread: the models of the tests are tiny, and threads only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Random weights of the tests, and of the commands they start, stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMKV_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
