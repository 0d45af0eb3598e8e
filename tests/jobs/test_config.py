"""The keys of a job, their defaults and their limits."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from jobs.config import SECTIONS, JobConfig
from jobs.layers import INPUT_PATHS
from jobs.resources import bundle_root

MINIMAL: dict[str, Any] = {
    "name": "a",
    "model": {"path": "/ckpt"},
    "prompts": {"generator": "avatars"},
    "output": {"uri": "out"},
}

# What a job that says nothing more gets. A change here changes what existing job files mean.
DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {
        "path": None,
        "repo": None,
        "source": "huggingface",
        "revision": None,
        "transformer": None,
        "vae": None,
        "text_encoder": None,
        "dtype": "bfloat16",
        "attention": "auto",
        "compile": "auto",
        "offload": "auto",
        "quantization": "none",
        "loras": {},
    },
    "prompts": {
        "profiles": None,
        "sheet": None,
        "start": 0,
        "count": None,
        "images_root": None,
        "options": {},
    },
    "sampling": {
        "width": 1024,
        "height": 1024,
        "num_inference_steps": 8,
        "guidance_scale": 0.0,
        "negative_prompt": "",
        "seed": 42,
        "images_per_prompt": 1,
        "batch_size": "auto",
        "max_sequence_length": 512,
        "cfg_normalization": False,
        "cfg_truncation": 1.0,
        "strength": 0.6,
        "cache": None,
    },
    "output": {
        "format": "png",
        "png_level": 1,
        "embed_metadata": "full",
        "layout": "files",
        "shard_size": 64,
    },
    "run": {
        "workers": "auto",
        "gpus_per_worker": 1.0,
        "threads_per_worker": 1,
        "max_shard_attempts": 3,
        "stall_timeout": 600.0,
        "max_failure_rate": 0.5,
    },
}


def job(**changes: Any) -> JobConfig:
    """Validate the minimal job with `section__key=value` changes."""
    data = {
        key: dict(value) if isinstance(value, dict) else value for key, value in MINIMAL.items()
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        data.setdefault(section, {})[key] = value
    return JobConfig.model_validate(data)


def sections() -> list[tuple[str, type[BaseModel]]]:
    found = []
    for name in SECTIONS:
        model = JobConfig.model_fields[name].annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        found.append((name, model))
    return found


def test_defaults_are_the_documented_ones() -> None:
    config = job(model__repo=None)
    dump = config.model_dump(mode="json")
    expected = {key: dict(value) for key, value in DEFAULTS.items()}
    expected["model"]["path"] = "/ckpt"
    expected["prompts"]["generator"] = "avatars"
    expected["output"]["uri"] = "out"
    assert dump == {"name": "a", **expected}
    for name, model in sections():
        required = {key for key, field in model.model_fields.items() if field.is_required()}
        assert required | set(DEFAULTS[name]) == set(model.model_fields)


def test_dump_is_complete_stable_and_validates_to_an_equal_config() -> None:
    config = job(
        model__loras={"ink": {"path": "/l.safetensors"}},
        prompts__options={"nested": {"list": [1, 2.5, None, True, "x"]}},
        sampling__cfg_normalization=True,
        run__workers=3,
    )
    dump = config.model_dump(mode="json")
    again = JobConfig.model_validate(dump)
    assert again == config
    assert hash(again) == hash(config)
    assert again.model_dump_json() == config.model_dump_json()
    assert dump["model"]["loras"] == {"ink": {"path": "/l.safetensors", "scale": 1.0}}
    assert again.sampling.cfg_normalization is True  # not 1.0
    assert job(run__workers=2) != config


def test_config_survives_pickling_with_its_files() -> None:
    config = job()
    config._files = (Path("/a.yaml"),)
    config._source = Path("/a.yaml")
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.files == (Path("/a.yaml"),)
    assert copy.source == Path("/a.yaml")


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        job().name = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__compile", True),
        ("model__attention", "_flash_3"),
        ("model__dtype", "auto"),
        ("model__loras", None),
        ("prompts__options", None),
        ("prompts__count", None),
        ("sampling__guidance_scale", 4),
        ("sampling__seed", 2**63 - 1),
        ("sampling__seed", 0),
        ("sampling__cfg_normalization", 1.5),
        ("sampling__batch_size", 4),
        ("sampling__width", 16),
        ("output__uri", "s3://bucket/a b"),
        ("output__layout", "webdataset"),
        ("output__png_level", 0),
        ("output__png_level", 9),
        ("run__gpus_per_worker", 0.25),
        ("run__gpus_per_worker", 2),
        ("run__max_failure_rate", 0),
    ],
)
def test_accepts(key: str, value: Any) -> None:
    section, _, name = key.partition("__")
    expected = {} if value is None and name in ("loras", "options") else value
    got = getattr(getattr(job(**{key: value}), section), name)
    assert got == expected
    assert isinstance(got, bool) == isinstance(expected, bool)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sampling__num_inference_steps", "8"),
        ("sampling__num_inference_steps", True),
        ("sampling__num_inference_steps", 8.0),
        ("sampling__num_inference_steps", 0),
        ("sampling__guidance_scale", True),
        ("sampling__guidance_scale", float("nan")),
        ("sampling__seed", -1),
        ("sampling__seed", 2**63),
        ("sampling__batch_size", "AUTO"),
        ("sampling__batch_size", True),
        ("sampling__width", 0),
        ("sampling__height", 1000),
        ("sampling__cfg_truncation", 1.01),
        ("sampling__strength", -0.1),
        ("sampling__negative_prompt", None),
        ("prompts__start", -1),
        ("prompts__count", 0),
        ("prompts__generator", " "),
        ("prompts__options", {"a": float("inf")}),
        ("model__compile", 1),
        ("model__path", 3),
        ("model__loras", {"../x": {"path": "/x"}}),
        ("model__loras", {"x": {"path": "/x", "scale": "1"}}),
        ("output__uri", "http://x/y"),
        ("output__uri", "s3://"),
        ("output__shard_size", 0),
        ("output__png_level", 10),
        ("output__png_level", -1),
        ("output__png_level", True),
        ("output__png_level", None),
        ("run__gpus_per_worker", 1.5),
        ("run__gpus_per_worker", 0),
        ("run__stall_timeout", 0),
        ("run__workers", 0),
    ],
)
def test_refuses(key: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        job(**{key: value})


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_a_level_of_png_belongs_to_png(form: str) -> None:
    assert job(output__format=form).output.png_level == 1
    assert job(output__format=form, output__png_level=1).output.format == form
    with pytest.raises(ValidationError, match=f"without meaning for output.format {form}"):
        job(output__format=form, output__png_level=2)


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "a b", "x" * 65, "é", "a\n"])
def test_refuses_names_that_are_no_file_names(name: str) -> None:
    with pytest.raises(ValidationError):
        JobConfig.model_validate(MINIMAL | {"name": name})


def test_folder_of_a_model_without_a_path_is_one_for_each_revision() -> None:
    one = job(model__path=None, model__repo="org/model").model.folder
    two = job(model__path=None, model__repo="org/model", model__revision="v/2").model.folder
    assert one.name == "org--model"
    assert two.name == "org--model--v--2"
    assert one.parent == two.parent
    assert job().model.folder == Path("/ckpt")


def test_every_path_key_is_resolved_by_the_reader() -> None:
    found = set()
    for name, model in sections():
        for key, field in model.model_fields.items():
            if "[Path," in repr(field):
                found.add((name, key))
    assert found | {("model", "loras", "*", "path")} == set(INPUT_PATHS)


@pytest.mark.skipif(
    not (bundle_root() / "docs" / "job-file.md").exists(), reason="the docs are not in the wheel"
)
def test_docs_name_every_key_with_its_default() -> None:
    text = (bundle_root() / "docs" / "job-file.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| [^|]+ \| `?([^|`]+)`? \|", text, re.MULTILINE))
    expected = {"name": "required"}
    for name, model in sections():
        for key in model.model_fields:
            default = DEFAULTS[name].get(key, "required")
            text = default if isinstance(default, str) else json.dumps(default)
            expected[f"{name}.{key}"] = text or '""'
    assert rows == expected
