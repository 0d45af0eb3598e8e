"""`model_index.json`: which classes a checkpoint's folders are of."""

from __future__ import annotations

from pathlib import Path

from zimage_core.config import CheckpointError, read_json_object
from zimage_core.weight_files import refuse_all

# What the file may name; the first is what the published folders name.
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
# What it names besides where the checkpoint takes pictures: both, or neither.
_VISION_CLASSES = {
    "siglip": ("Siglip2VisionModel",),
    "siglip_processor": (
        "Siglip2ImageProcessor",
        "Siglip2ImageProcessorFast",
        "Siglip2ImageProcessorPil",
    ),
}
_PLAIN, _OMNI = "ZImagePipeline", "ZImageOmniPipeline"


def check_model_index(root: Path) -> bool:
    """Check the file of a checkpoint's folder.

    Returns:
        Whether the checkpoint takes pictures: it names `siglip` and `siglip_processor`.

    Raises:
        CheckpointError: there is no such folder; the file is missing, or names another pipeline, an
            unknown component or another class.
    """
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder")
    path = root / "model_index.json"
    values = read_json_object(path)
    pipeline = values.get("_class_name")
    if pipeline not in (_PLAIN, _OMNI):
        raise CheckpointError(
            f"{path}: _class_name is {pipeline!r}; allowed: {_PLAIN!r} or {_OMNI!r}"
        )
    named = {key: value for key, value in values.items() if not key.startswith("_")}
    takes_pictures = pipeline == _OMNI or any(key in named for key in _VISION_CLASSES)
    classes = _CLASSES | _VISION_CLASSES if takes_pictures else _CLASSES
    problems = [
        f"{path}: unknown component {key!r} with value {value!r}; allowed: {', '.join(classes)}"
        for key, value in named.items()
        if key not in classes
    ]
    for name, allowed in classes.items():
        value = named.get(name)
        if not isinstance(value, list) or len(value) != 2 or value[1] not in allowed:
            problems.append(f"{path}: {name} is {value!r}; allowed: {' or '.join(allowed)}")
    refuse_all(problems)
    return takes_pictures
