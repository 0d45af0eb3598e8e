"""Checkpoints of others that cannot be used: one error each, with file, key, value and allowed."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounds import Refuser
from cli_calls import CHECKPOINT
from raw_weights import entry, safetensors, sparse, split_safetensors

VAE = "vae/diffusion_pytorch_model.safetensors"
INDEX = f"{VAE}.index.json"
HEADER, DATA = split_safetensors((CHECKPOINT / VAE).read_bytes())
FIRST = next(key for key in HEADER if key != "__metadata__")


def header_with(**changes: object) -> dict[str, Any]:
    """The autoencoder's header with its first tensor changed."""
    return {**HEADER, FIRST: {**HEADER[FIRST], **changes}}


class Dangerous:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch outside",)


# What the file of the autoencoder's weights holds, and the words of the error.
WEIGHTS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "empty": (b"", "is truncated: 0 bytes do not hold its header"),
    "seven bytes": (b"1234567", "is truncated: 7 bytes"),
    "a pickle": (lambda: pickle.dumps(Dangerous()), "is corrupt, or no safetensors file"),
    "a ZIP with a pickle": (b"PK\x03\x04" + bytes(400), "is a ZIP file, as pickles are, which"),
    "a pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "is a Git LFS pointe",
    ),
    "a header past the end": (safetensors(HEADER, length=10_000_000), "is truncated: "),
    "a header of 2**64 - 1": (safetensors(HEADER, length=2**64 - 1), "is corrupt, or no safetens"),
    "a header of 0": (safetensors(b""), "is corrupt, or no safetensors file"),
    "cut off": (lambda: safetensors(HEADER, DATA[:-1]), "is truncated: "),
    "a byte too many": (lambda: safetensors(HEADER, DATA + b"x"), "is corrupt: "),
    "no JSON": (safetensors("{" * 100), "is corrupt, or no safetensors file"),
    "a list": (safetensors([]), "is corrupt, or no safetensors file"),
    "null": (safetensors("null"), "is corrupt, or no safetensors file"),
    "nested": (safetensors('{"a":' * 50_000), "is corrupt, or no safetensors file"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "is corrupt, or no safetensors file"),
    "a key twice": (
        safetensors(b'{"a": {}, "a": {}}'),
        "is corrupt, or no safetensors file",
    ),
    "no offsets": (lambda: safetensors({**HEADER, FIRST: {}}, DATA), "is corrupt, or no safetenso"),
    "offsets below 0": (
        lambda: safetensors(header_with(data_offsets=[-4, 4]), DATA),
        "is corrupt, or no safetensors file",
    ),
    "one offset": (lambda: safetensors(header_with(data_offsets=[0]), DATA), "is corrupt, or no"),
    "offsets of fractions": (
        lambda: safetensors(header_with(data_offsets=[0.0, 4.5]), DATA),
        "is corrupt, or no safetensors file",
    ),
    "offsets of booleans": (
        lambda: safetensors(header_with(data_offsets=[False, True]), DATA),
        "is corrupt, or no safetensors file",
    ),
    "offsets of text": (
        lambda: safetensors(header_with(data_offsets=["0", "4"]), DATA),
        "is corrupt, or no safetensors file",
    ),
    "infinite offsets": (
        safetensors('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}'),
        "is corrupt, or no safetensors file",
    ),
    "offsets the wrong way": (
        safetensors({"a": entry("F32", [1], 4, 0)}, bytes(4)),
        "is corrupt: bytes 4 to 0 cannot be those of tensor 'a', F32 [1]",
    ),
    "offsets past the end": (
        safetensors({"a": entry("F32", [2**40], 0, 2**42)}, bytes(4)),
        "is truncated: ",
    ),
    "two tensors in one place": (
        safetensors({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, bytes(4)),
        "is corrupt: bytes 0 to 4 cannot be those of tensor 'b'",
    ),
    "a gap": (
        safetensors({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12)),
        "is corrupt: bytes 8 to 12 cannot be those of tensor 'b'",
    ),
    "a shape of another size": (
        safetensors({"a": entry("F32", [2], 0, 4)}, bytes(4)),
        "cannot be those of tensor 'a', F32 [2]",
    ),
    "a shape below 0": (
        safetensors({"a": entry("F32", [-1, -1], 0, 4)}, bytes(4)),
        "is corrupt, or no safetensors file",
    ),
    "a shape whose product overflows": (
        safetensors({"a": entry("F32", [2**62, 2**62, 4], 0, 4)}, bytes(4)),
        "cannot be those of tensor 'a', F32 [4611686018427387904, ",
    ),
    "a shape of 9 dimensions": (
        safetensors({"a": entry("F32", [1] * 9, 0, 4)}, bytes(4)),
        "is corrupt, or no safetensors file",
    ),
    "an unknown dtype": (
        safetensors({"a": entry("F31", [1], 0, 4)}, bytes(4)),
        "tensor 'a' is stored as F31; allowed: F32, F16, BF16, F8_E4M3, F8_E5M2",
    ),
    "a dtype of 1 MB": (
        safetensors({"a": entry("F" * 2**20, [1], 0, 4)}, bytes(4)),
        f"tensor 'a' is stored as {'F' * 40}; allowed: ",
    ),
    "a dtype of integers": (
        lambda: safetensors(header_with(dtype="I32", shape=HEADER[FIRST]["shape"]), DATA),
        "cannot be those of tensor",
    ),
    "a name of 1 MB": (
        safetensors({"a" * 2**20: entry("F32", [1], 0, 4)}, bytes(4)),
        "has a tensor whose name has 1,048,576 characters; allowed: up to 1,000",
    ),
    "metadata of a list": (
        safetensors({"__metadata__": [1], "a": entry("F32", [1], 0, 4)}, bytes(4)),
        "is corrupt, or no safetensors file",
    ),
    "another model": (
        safetensors({"a": entry("F32", [1], 0, 4)}, bytes(4)),
        "missing tensor 'encoder.conv_in.weight' of shape [32, 3, 3, 3]",
    ),
}


@pytest.fixture
def checkpoint(refuse: Refuser) -> Path:
    """A copy of the tiny checkpoint, its large files as links."""
    folder = refuse.folder / "ckpt"
    shutil.copytree(CHECKPOINT, folder, copy_function=_link_or_copy)
    return folder


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        Path(target).symlink_to(source)
    else:
        shutil.copy(source, target)


def replaced(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def refuse_model(refuse: Refuser, *words: str, problems: int = 1) -> None:
    plan = ["plan", "job.yaml", "--set", "model.path=ckpt"]
    refuse(*plan, code=5, words=["model.path: ", *words], problems=problems)
    assert not (refuse.folder / "outside").exists()


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(refuse: Refuser, checkpoint: Path, case: str) -> None:
    made, words = WEIGHTS[case]
    replaced(checkpoint / VAE, made if isinstance(made, bytes) else made())
    many = 11 if case == "another model" else 1  # what is missing is told with it
    refuse_model(refuse, f"ckpt/{VAE}: ", words, problems=many)


# Changes of a JSON file, and the words of the error.
CONFIGS: dict[str, tuple[str, dict[str, object] | bytes, str]] = {
    "text": ("transformer", {"dim": "160"}, "dim is '160'; allowed: a whole number above 0"),
    "a boolean": ("transformer", {"dim": True}, "dim is True; allowed: a whole number above 0"),
    "a fraction": ("transformer", {"dim": 160.0}, "dim is 160.0; allowed: a whole number above 0"),
    "below 0": ("transformer", {"n_layers": -1}, "n_layers is -1; allowed: a whole number from 1"),
    "a thousand billion layers": ("transformer", {"n_layers": 10**12}, "from 1 to 1024"),
    "a huge width": ("transformer", {"dim": 2**40}, "dim is 1099511627776; allowed: a whole"),
    "4000 digits": ("vae", {"in_channels": 10**4000}, "in_channels is 1000000"),
    "NaN": ("transformer", {"norm_eps": float("nan")}, "norm_eps is nan; allowed: a number above"),
    "infinity": ("vae", {"scaling_factor": float("inf")}, "scaling_factor is inf; allowed: a numb"),
    "a huge theta": ("transformer", {"rope_theta": 10**400}, "rope_theta is 100000"),
    "long axes": ("transformer", {"axes_lens": [10**9] * 3}, "axes_lens is [1000000000, "),
    "many axes": ("transformer", {"axes_dims": [8] * 1000}, "axes_dims is [8, 8, "),
    "no axes": ("transformer", {"axes_dims": []}, "axes_dims is []; allowed: a list"),
    "a mapping": ("text_encoder", {"rope_parameters": {"a": 1}}, "rope_parameters is {'a': 1}; al"),
    "an unknown key": ("vae", {"auto_map": {"AutoModel": "x.Evil"}}, "unknown key 'auto_map'"),
    "quantised": (
        "transformer",
        {"quantization_config": {"quant_method": "bnb"}},
        "with bnb, whi",
    ),
    "another model": ("text_encoder", {"model_type": "llama"}, "model_type is 'llama'; allowed"),
    "a list": ("vae", b"[]", "must hold a JSON object, not list"),
    "text alone": ("vae", b'"x"', "must hold a JSON object, not str"),
    "empty": ("vae", b"", "cannot be read as JSON: Expecting value"),
    "cut off": ("vae", b'{"in_channels": 3', "cannot be read as JSON: "),
    "not UTF-8": ("vae", b'{"a": "\xff"}', "cannot be read as JSON: 'utf-8' codec can't decode"),
    "nested": ("vae", b'{"a":' * 50_000, "cannot be read as JSON: "),
    "a key twice": ("vae", b'{"act_fn": "silu", "act_fn": "x"}', "key 'act_fn' is given twice"),
    "a number of 5000 digits": ("vae", b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON: "),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(refuse: Refuser, checkpoint: Path, case: str) -> None:
    model, change, words = CONFIGS[case]
    path = checkpoint / model / "config.json"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refuse_model(refuse, f"ckpt/{model}/config.json: ", words)


MODEL_INDEX: dict[str, tuple[dict[str, object], str]] = {
    "another pipeline": ({"_class_name": "FluxPipeline"}, "_class_name is 'FluxPipeline'; allowed"),
    "code of its own": (
        {"transformer": ["pipeline", "Evil"]},
        "transformer is ['pipeline', 'Evil",
    ),
    "a component more": ({"extra": ["os", "system"]}, "unknown component 'extra' with value"),
    "a component of text": ({"vae": "AutoencoderKL"}, "vae is 'AutoencoderKL'; allowed: Autoencod"),
}


@pytest.mark.parametrize("case", MODEL_INDEX)
def test_model_index(refuse: Refuser, checkpoint: Path, case: str) -> None:
    change, words = MODEL_INDEX[case]
    path = checkpoint / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refuse_model(refuse, "ckpt/model_index.json: ", words)


TOKENIZERS: dict[str, tuple[dict[str, object], str]] = {
    "no template": ({"chat_template": None}, "chat_template is None; allowed: a template as text"),
    "a template of a list": ({"chat_template": [1]}, "chat_template is [1]; allowed"),
    "another wrapping": ({"chat_template": "{{ messages[0].content }}"}, "chat_template gives"),
    "no template's syntax": ({"chat_template": "{% if %}"}, "chat_template cannot be run: Templat"),
    "a template that reaches out": (
        {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
        "chat_template cannot be run: SecurityError",
    ),
    "a template that includes": (
        {"chat_template": "{% include '/etc/passwd' %}"},
        "chat_template cannot be run: ",
    ),
    "a template without end": (
        {"chat_template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
         "{% endfor %}"},
        "chat_template needs too much time or memory",
    ),
    "a template of all memory": (
        {"chat_template": "{{ 'a' * 10**10 }}"},
        "chat_template ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer(refuse: Refuser, checkpoint: Path, case: str) -> None:
    change, words = TOKENIZERS[case]
    path = checkpoint / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refuse_model(refuse, "ckpt/tokenizer/tokenizer_config.json: ", words)


# What the index of shards says, and the words of the error.
INDICES: dict[str, tuple[object, str]] = {
    "the folder above": ({FIRST: "../x.safetensors"}, "weight_map names '../x.safetensors'; allow"),
    "a path": ({FIRST: "/etc/x.safetensors"}, "weight_map names '/etc/x.safetensors'; allowed: a"),
    "a pickle": ({FIRST: "model.bin"}, "weight_map names 'model.bin'; allowed: a .safetensors"),
    "dots": ({FIRST: ".."}, "weight_map names '..'; allowed"),
    "a NUL byte": ({FIRST: "a\0.safetensors"}, "weight_map names 'a\\x00.safetensors'; allowed"),
    "a long name": ({FIRST: "a" * 5000 + ".safetensors"}, "; allowed: a .safetensors file"),
    "a number": ({FIRST: 7}, "weight_map names '7'; allowed: a .safetensors file in its folder"),
    "nothing there": ({FIRST: "gone.safetensors"}, "gone.safetensors: file is missing, which "),
    "empty": ({}, "weight_map must map tensors to files"),
    "a list": ([], "weight_map must map tensors to files"),
    "null": (None, "weight_map must map tensors to files"),
}


@pytest.mark.parametrize("case", INDICES)
def test_index(refuse: Refuser, checkpoint: Path, case: str) -> None:
    weight_map, words = INDICES[case]
    (checkpoint / VAE).unlink()
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refuse_model(refuse, words)


def test_pickles_and_files_that_are_none(refuse: Refuser, checkpoint: Path) -> None:
    (checkpoint / VAE).unlink()
    pickled = checkpoint / "vae/diffusion_pytorch_model.bin"
    pickled.write_bytes(pickle.dumps(Dangerous()))
    refuse_model(refuse, "diffusion_pytorch_model.bin: is a pickle, which can run code when it is")
    for part in ("transformer", "vae", "text_encoder"):
        refuse(
            *("plan", "job.yaml", "--set", f"model.path={CHECKPOINT}"),
            *("--set", f"model.{part}={pickled}"),
            code=5,
            words=[f"model.{part}: {pickled}: is a pickle, which can run code when it is read"],
        )
    pickled.unlink()
    os.mkfifo(checkpoint / VAE)
    refuse_model(refuse, f"{VAE}: file is missing")
    (checkpoint / VAE).unlink()
    (checkpoint / VAE).symlink_to("/dev/zero")
    refuse_model(refuse, f"{VAE}: file is missing")
    config = checkpoint / "vae/config.json"
    for make, words in (
        (lambda: os.mkfifo(config), "cannot be read as JSON: is a pipe; allowed: a file"),
        (lambda: config.symlink_to("/dev/zero"), "cannot be read as JSON: is a device; allowed"),
        (lambda: config.mkdir(), "cannot be read as JSON: is a folder; allowed: a file"),
        (lambda: sparse(config, b"{", 2**40), "cannot be read as JSON: over 67,108,864 bytes"),
    ):
        (checkpoint / VAE).unlink(missing_ok=True)
        (checkpoint / VAE).symlink_to(CHECKPOINT / VAE)
        config.rmdir() if config.is_dir() else config.unlink(missing_ok=True)
        make()
        refuse_model(refuse, f"ckpt/vae/config.json: {words}")


def test_headers_in_large_files(refuse: Refuser, checkpoint: Path) -> None:
    """Sparse, so that the file's size alone bounds nothing."""
    (checkpoint / VAE).unlink()
    for content, words in (
        (safetensors(b"", length=2**30), "its header has 1,073,741,824 bytes; allowed: up to 25,"),
        (safetensors(b"", length=20_000_000), "is corrupt, or no safetensors file"),
    ):
        sparse(checkpoint / VAE, content, 2**36)
        refuse_model(refuse, f"ckpt/{VAE}: ", words)
