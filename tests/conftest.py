"""What every test shares: one torch thread, no hub access, no Ray state in the user's home."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pytest
import torch

torch.set_num_threads(1)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Where several processes run the tests, a file stays in one, and so do all that start Ray.

    Here and not when all are collected, since xdist reads the groups before a conftest is asked.
    """
    group = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
    item.add_marker(pytest.mark.xdist_group(group))
