"""Imported once by the process that `hub_clients` forks its clients off."""

import os

os.environ["HF_HUB_OFFLINE"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"

import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import zimage_core.weights  # noqa: F401
