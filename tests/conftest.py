"""What every test shares: one torch thread, no hub access, no Ray state in the user's home."""

import functools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)  # asked by pytest-xdist, where it is used
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes run the tests, a file stays in one, and so do all that start Ray.

    The groups of `--dist loadgroup` would do it, but xdist 3.8 marks them in a way that pytest 9.2
    does not see.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc,unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            return _group(config.rootpath / nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # the files that start Ray take longest: not at the end
    return ByFile(config, log)


@functools.cache
def _group(file: Path) -> str:
    return "ray" if "mark.ray" in file.read_text(encoding="utf-8") else str(file)
