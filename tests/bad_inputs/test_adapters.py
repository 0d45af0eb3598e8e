"""LoRA files of others that cannot be used: one error each, before any weight is read."""

import json
import os
import pickle
from collections.abc import Callable

import pytest
from bounds import Refuser
from raw_weights import entry, safetensors

Q = "layers.0.attention.to_q"
RANK, DIM = 2, 160  # of the tiny checkpoint


def adapter(
    metadata: object = None, more: dict[str, object] | None = None, name: str = Q, data: int = 0
) -> bytes:
    """A LoRA of one module, and what else a header shall hold."""
    size = 4 * RANK * DIM
    header: dict[str, object] = {
        f"{name}.lora_A.weight": entry("F32", [RANK, DIM], 0, size),
        f"{name}.lora_B.weight": entry("F32", [DIM, RANK], size, 2 * size),
        **(more or {}),
    }
    if metadata is not None:
        header["__metadata__"] = metadata
    return safetensors(header, bytes(2 * size + data))


def configured(**values: object) -> bytes:
    """An adapter with diffusers' config in its metadata."""
    named = {f"transformer.{key}": value for key, value in values.items()}
    return adapter({"lora_adapter_metadata": json.dumps(named)})


def far(key: str) -> bytes:
    """An adapter with one tensor more, of another name."""
    end = 8 * RANK * DIM
    return adapter(more={key: entry("F32", [1], end, end + 4)}, data=4)


FILES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "empty": (b"", "ink.safetensors: is truncated: 0 bytes"),
    "a pickle": (lambda: pickle.dumps([1]), "ink.safetensors: is corrupt, or no safetens"),
    "a ZIP with a pickle": (b"PK\x03\x04" + bytes(400), "is a ZIP file, as pickles are"),
    "no tensors": (safetensors({}), "ink.safetensors: holds no tensors"),
    "metadata alone": (safetensors({"__metadata__": {"a": "b"}}), "holds no tensors"),
    "for another model": (
        adapter(name="blocks.0.attn"),
        "none of its 2 tensors matches the transformer: 'blocks.0.attn.lora_A.weight'",
    ),
    "whole numbers": (
        safetensors({f"{Q}.lora_A.weight": entry("I64", [1, 1], 0, 8)}, bytes(8)),
        f"tensor '{Q}.lora_A.weight' is stored as I64; allowed: F32, F16, BF16, F64",
    ),
    "a huge rank": (
        safetensors({f"{Q}.lora_A.weight": entry("F32", [2**40, DIM], 0, 2**42 * DIM)}, bytes(4)),
        "ink.safetensors: is truncated",
    ),
    "no partner": (
        safetensors({f"{Q}.lora_A.weight": entry("F32", [0, DIM], 0, 0)}),
        "lacks its partner, up",
    ),
    "a name of prefixes": (
        far("model_" * 150_000 + "x.lora_A.weight"),
        "has a tensor whose name has 900,015 characters; allowed: up to 1,000",
    ),
    "a name of dots": (far("a." * 400_000 + "weight"), "whose name has 800,006 characters"),
    "config of no JSON": (adapter({"lora_adapter_metadata": "{"}), "is no JSON object"),
    "config of a list": (adapter({"lora_adapter_metadata": "[1]"}), "is no JSON object"),
    "config that is nested": (
        adapter({"lora_adapter_metadata": '{"a":' * 50_000}),
        "metadata lora_adapter_metadata: is no JSON object",
    ),
    "config with a key twice": (
        adapter({"lora_adapter_metadata": '{"transformer.r": 1, "transformer.r": 2}'}),
        "is no JSON object",
    ),
    "a rank of text": (configured(r="4"), "r is '4'; allowed: a number above 0"),
    "a rank below 1": (configured(r=0.5), "r is 0.5; allowed: a whole number above 0"),
    "a rank of 400 digits": (configured(r=10**400), "r is 1000000"),
    "a strength of NaN": (configured(lora_alpha=float("nan")), "lora_alpha is nan; allowed: a num"),
    "a strength of 0": (configured(lora_alpha=0), "lora_alpha is 0; allowed: a number above 0"),
    "a rank of a pattern": (
        configured(rank_pattern={"to_q": 0.5}),
        "rank_pattern.to_q is 0.5; allowed: a whole number above 0",
    ),
    "patterns of a list": (
        configured(alpha_pattern=["a"]),
        "alpha_pattern is ['a']; allowed: a m",
    ),
    "no pattern": (configured(alpha_pattern={"[": 1}), "alpha_pattern: '[' is no pattern"),
    "a pattern without end": (
        configured(alpha_pattern={"(a+)+$": 1}),
        "alpha_pattern: '(a+)+$' could take too long to match",
    ),
    "a pattern of much memory": (
        configured(alpha_pattern={"a{99999999999999}": 1}),
        "alpha_pattern: 'a{99999999999999}' is no pattern",
    ),
    "a long pattern": (configured(alpha_pattern={"a" * 10_000: 1}), "could take too long to match"),
    "many patterns": (
        configured(alpha_pattern={str(i): 1 for i in range(3000)}),
        "alpha_pattern has 3,000 entries; allowed: up to 2,000",
    ),
    "another kind": (configured(peft_type="BOFT"), "peft_type is 'BOFT'; allowed: LORA, LOHA, LOK"),
    "a kind of a list": (configured(peft_type=[1]), "peft_type is [1]; allowed"),
    "code as a start": (configured(init_lora_weights={"a": 1}), "init_lora_weights is {'a': 1}"),
}


@pytest.mark.parametrize("case", FILES)
def test_file(refuse: Refuser, case: str) -> None:
    made, words = FILES[case]
    content = made if isinstance(made, bytes) else made()
    (refuse.folder / "ink.safetensors").write_bytes(content)
    loras = ["--set", "model.loras={ink: {path: ink.safetensors}}"]
    refuse("plan", "job.yaml", *loras, code=2, words=["model.loras.ink.path: ", words])


def test_config_beside_it(refuse: Refuser) -> None:
    """PEFT's own name asks for a file beside it, which may be anything."""
    (refuse.folder / "adapter_model.safetensors").write_bytes(adapter())
    config = refuse.folder / "adapter_config.json"
    loras = ["--set", "model.loras={ink: {path: adapter_model.safetensors}}"]
    for make, words in (
        (lambda: None, "adapter_config.json is missing beside it"),
        (lambda: os.mkfifo(config), "adapter_config.json is missing beside it"),
        (lambda: config.symlink_to("/dev/zero"), "adapter_config.json is missing beside it"),
        (lambda: config.write_text("[]"), "adapter_config.json: must hold a JSON object, not list"),
        (lambda: config.write_text('{"r": []}'), "adapter_config.json: r is []; allowed: a number"),
    ):
        config.unlink(missing_ok=True)
        make()
        refuse("plan", "job.yaml", *loras, code=2, words=["model.loras.ink.path: ", words])


def test_files_that_are_none(refuse: Refuser) -> None:
    folder = refuse.folder
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    (folder / "folder.safetensors").mkdir()
    (folder / "ink.pt").write_bytes(pickle.dumps([1]))
    for name, words in {
        "pipe.safetensors": "pipe.safetensors: no such file",
        "zero.safetensors": "zero.safetensors: no such file",
        "folder.safetensors": "folder.safetensors: is a folder; allowed: a .safetensors file",
        "ink.pt": "ink.pt: is a pickle, which can run code when it is read; allowed: a .safetens",
    }.items():
        loras = ["--set", f"model.loras={{ink: {{path: {name}}}}}"]
        refuse("plan", "job.yaml", *loras, code=2, words=["model.loras.ink.path: ", words])
