"""A checkpoint folder on disk: its files, their tensors by header, and whether all of it fits.

Everything here reads JSON and the headers of weight files, never weights, so that a folder of
30 GB is checked in well under a second and a broken one is found before any of it is loaded.

The layout is diffusers': `model_index.json` and the folders `scheduler`, `tokenizer`,
`text_encoder`, `transformer`, `vae`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from zimage_core.autoencoder import AutoencoderKL
from zimage_core.config import (
    AutoencoderConfig,
    CheckpointError,
    TextEncoderConfig,
    TransformerConfig,
    read_json,
    read_json_object,
)
from zimage_core.scheduler import FlowMatchEulerDiscreteScheduler
from zimage_core.text_encoder import TextEncoder, full_model_shapes, text_encoder_shapes
from zimage_core.transformer import ZImageTransformer2DModel
from zimage_core.weight_files import StoredTensor, find_weight_files, read_header, refuse_all

# What `model_index.json` may name; the first is what the published folders name.
_CLASSES = {
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    "tokenizer": (
        "Qwen2Tokenizer",
        "Qwen2TokenizerFast",
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
    ),
    "transformer": ("ZImageTransformer2DModel",),
    "vae": ("AutoencoderKL",),
}
_STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@dataclass(frozen=True)
class Component:
    """One model of a checkpoint: how to make its module and the tensors that fill it.

    Attributes:
        make_module: makes it on the meta device, in no particular dtype.
        files: weight files and, where there are several, their index.
        tensors: by key of the module's state dict, complete and of the right shapes.
        prefix: what the files put in front of each key.
    """

    make_module: Callable[[], nn.Module]
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    prefix: str

    @property
    def num_parameters(self) -> int:
        """Number of elements of the tensors that are loaded."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was found complete: nothing of it is loaded yet."""

    transformer_config: TransformerConfig
    autoencoder_config: AutoencoderConfig
    text_encoder_config: TextEncoderConfig
    scheduler: FlowMatchEulerDiscreteScheduler
    components: Mapping[str, Component]


def open_checkpoint(model_dir: Path | str) -> Checkpoint:
    """Check a folder from its JSON and headers.

    Raises:
        CheckpointError: anything is missing, unexpected, mis-shaped, truncated or corrupt; all that
            was found, one problem a line, each with its file.
    """
    root = Path(model_dir)
    _check_model_index(root)
    problems: list[str] = []

    def attempt(read: Any, *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except CheckpointError as error:
            problems.append(str(error))
            return None

    _ = attempt(_check_tokenizer, root / "tokenizer")
    scheduler = attempt(
        FlowMatchEulerDiscreteScheduler.from_json, root / "scheduler" / "scheduler_config.json"
    )
    transformer = attempt(TransformerConfig.from_json, root / "transformer" / "config.json")
    vae = attempt(AutoencoderConfig.from_json, root / "vae" / "config.json")
    text = attempt(TextEncoderConfig.from_json, root / "text_encoder" / "config.json")
    models = {
        "transformer": (transformer, ZImageTransformer2DModel),
        "vae": (vae, AutoencoderKL),
        "text_encoder": (text, TextEncoder),
    }
    components = {
        name: attempt(_open_component, root / name, _STEMS[name], config, model)
        for name, (config, model) in models.items()
        if config is not None
    }
    if transformer and vae and vae.latent_channels != transformer.in_channels:
        problems.append(
            f"{root / 'vae' / 'config.json'}: latent_channels is {vae.latent_channels}, but the "
            f"transformer's in_channels is {transformer.in_channels}"
        )
    if transformer and text and text.hidden_size != transformer.cap_feat_dim:
        problems.append(
            f"{root / 'text_encoder' / 'config.json'}: hidden_size is {text.hidden_size}, but the "
            f"transformer's cap_feat_dim is {transformer.cap_feat_dim}"
        )
    refuse_all(problems)
    return Checkpoint(transformer, vae, text, scheduler, components)


def checkpoint_files(model_dir: Path | str) -> list[Path]:
    """List every file that loading reads, sorted.

    Raises:
        CheckpointError: a file that loading needs is missing, or an index cannot be read.
    """
    root = Path(model_dir)
    _check_model_index(root)
    files = [
        root / "model_index.json",
        root / "scheduler" / "scheduler_config.json",
        root / "tokenizer" / "tokenizer.json",
        root / "tokenizer" / "tokenizer_config.json",
    ]
    template = root / "tokenizer" / "chat_template.jinja"
    if template.is_file():
        files.append(template)
    for name, stem in _STEMS.items():
        files.append(root / name / "config.json")
        files.extend(find_weight_files(root / name, stem)[0])
    refuse_all(f"{path}: file is missing" for path in files if not path.is_file())
    return sorted(files)


def _open_component(folder: Path, stem: str, config: Any, model: type[nn.Module]) -> Component:
    """Find the tensors of a model and compare them with those that its configuration asks for."""
    files, weight_map = find_weight_files(folder, stem)
    problems: list[str] = []
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if file.suffix == ".json":
            continue
        header = read_header(file)
        if weight_map is not None:
            listed = {key for key, name in weight_map.items() if name == file.name}
            problems += [
                f"{file}: missing tensor {key!r}, which the index lists there"
                for key in sorted(listed - set(header))
            ]
            problems += [
                f"{file}: unexpected tensor {key!r}, which the index does not list there"
                for key in sorted(set(header) - listed)
            ]
            header = {key: tensor for key, tensor in header.items() if key in listed}
        stored.update(header)
    refuse_all(problems)

    make_module = partial(_make_empty, model, config)
    prefix, ignored = "", {}
    if not isinstance(config, TextEncoderConfig):
        state = make_module().state_dict()
        expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
    else:
        # Building this one imports transformers.
        expected = text_encoder_shapes(config)
        # Published as the causal model (`model.layers...`), saved by others without the prefix.
        prefix = "model." if any(key.startswith("model.") for key in stored) else ""
        ignored = {
            prefix + key: shape
            for key, shape in full_model_shapes(config).items()
            if key not in expected
        }
        ignored["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    allowed = {**{prefix + key: shape for key, shape in expected.items()}, **ignored}
    source = files[-1]
    for key, shape in allowed.items():
        if key not in stored:
            if key not in ignored:
                problems.append(f"{source}: missing tensor {key!r} of shape {list(shape)}")
        elif stored[key].shape != shape:
            problems.append(
                f"{stored[key].file}: tensor {key!r} has shape {list(stored[key].shape)}, but "
                f"config.json asks for {list(shape)}"
            )
    problems += [
        f"{tensor.file}: unexpected tensor {key!r} of shape {list(tensor.shape)}"
        for key, tensor in stored.items()
        if key not in allowed
    ]
    refuse_all(problems)
    tensors = {key: stored[prefix + key] for key in expected}
    return Component(make_module, tuple(files), tensors, prefix)


def _make_empty(model: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"), _NoInitialisation():
        return model(config)


class _NoInitialisation(TorchFunctionMode):
    """Leave out random initialisation: on the meta device it does nothing, but its first use
    imports a second's worth of torch.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _check_model_index(root: Path) -> None:
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder")
    path = root / "model_index.json"
    values = read_json_object(path)
    pipeline = values.get("_class_name")
    if pipeline != "ZImagePipeline":
        raise CheckpointError(f"{path}: _class_name is {pipeline!r}; allowed: 'ZImagePipeline'")
    named = {key: value for key, value in values.items() if not key.startswith("_")}
    problems = [
        f"{path}: unknown component {key!r} with value {value!r}; allowed: {', '.join(_CLASSES)}"
        for key, value in named.items()
        if key not in _CLASSES
    ]
    for name, classes in _CLASSES.items():
        value = named.get(name)
        if not isinstance(value, list) or len(value) != 2 or value[1] not in classes:
            problems.append(f"{path}: {name} is {value!r}; allowed: {' or '.join(classes)}")
    refuse_all(problems)


def _check_tokenizer(folder: Path) -> None:
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path)
    if "chat_template" not in config and not (folder / "chat_template.jinja").is_file():
        raise CheckpointError(f"{config_path}: missing key 'chat_template'")
    if "model" not in read_json_object(folder / "tokenizer.json"):
        raise CheckpointError(f"{folder / 'tokenizer.json'}: missing key 'model'")
