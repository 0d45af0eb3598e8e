"""Our own parsers on good files changed at random: a valid result or our own error, nothing else.

Runs are reproducible. Many more changes are tried under the marker `slow`.
"""

import csv
import io
import json
import string
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import yaml
from cli_calls import CHECKPOINT, JOB
from hypothesis import given
from hypothesis import strategies as st
from lora_files import CONFIG
from mutations import EXAMPLES, JUNK, mutated, mutated_tree, tried
from raw_weights import entry, gguf, gguf_tensor, gguf_value, safetensors, text

from jobs.commits import PartName
from jobs.config import NAME_PATTERN, JobConfig
from jobs.epoch import is_alive, newest_claim, read_events
from jobs.errors import StorageError
from jobs.executor import Settings
from jobs.job_file import JobFileError, load_job
from jobs.output import read_image_bytes
from jobs.plan import new_plan
from jobs.record import JobRecord, PromptSource, read_record
from jobs.storage import Storage
from jobs.yaml_file import YamlFileError, read_value
from prompt_generators import ProfileError, read_profiles
from prompt_generators.base import Prompt
from prompt_generators.template import parse_template
from zimage_core.config import CheckpointError, TransformerConfig, read_json_object
from zimage_core.gguf_file import read_gguf_header
from zimage_core.image_files import ImageFileError, path_below
from zimage_core.lora import check_lora, empty_transformer
from zimage_core.lora_names import ModuleNames, split_key
from zimage_core.safetensors_file import read_header

Q = "layers.0.attention.to_q"
HEADER = {
    "__metadata__": {"format": "pt"},
    f"{Q}.lora_A.weight": entry("F32", [2, 48], 0, 384),
    f"{Q}.lora_B.weight": entry("F16", [48, 2], 384, 576),
    f"{Q}.alpha": entry("BF16", [], 576, 578),
}
DATA = bytes(578)


def refused(error: type[Exception], read: Callable[[], Any], *named: object) -> Any:
    """What `read` returns, or None where it raises an `error` that says where."""
    try:
        return read()
    except error as refusal:
        assert all(str(name) in str(refusal) for name in named), refusal
        assert str(refusal)
        return None


# Weights.


@EXAMPLES
def test_safetensors_header(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "a.safetensors"

    @tried(examples)
    @given(
        st.one_of(
            mutated(safetensors(HEADER, DATA)),
            mutated_tree(HEADER).map(lambda tree: safetensors(tree, DATA)),
        )
    )
    def read(content: bytes) -> None:
        path.write_bytes(content)
        header = refused(CheckpointError, lambda: read_header(path), path)
        for tensor in header.tensors.values() if header else ():
            assert 8 <= tensor.offset <= tensor.offset + tensor.num_bytes <= len(content)
            assert tensor.num_bytes <= len(content)

    read()


GGUF = gguf(
    [
        gguf_value("general.architecture", 8, text("lumina2")),
        gguf_value("general.alignment", 4, (32).to_bytes(4, "little")),
        gguf_value("a.b", 9, (8).to_bytes(4, "little") + (2).to_bytes(8, "little") + text("x") * 2),
        gguf_value("c", 6, bytes(4)),
    ],
    [gguf_tensor("a", [4, 8], 0, 0), gguf_tensor("b", [256], 12, 128)],
    bytes(128 + 144),
)


@EXAMPLES
def test_gguf_header(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "a.gguf"

    @tried(examples)
    @given(mutated(GGUF))
    def read(content: bytes) -> None:
        path.write_bytes(content)
        header = refused(CheckpointError, lambda: read_gguf_header(path), path)
        for tensor in header.tensors.values() if header else ():
            assert 0 <= tensor.offset <= tensor.offset + tensor.num_bytes <= len(content)

    path.write_bytes(GGUF)
    assert read_gguf_header(path).tensors.keys() == {"a", "b"}
    read()


@EXAMPLES
def test_config(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "config.json"
    good = json.loads((CHECKPOINT / "transformer/config.json").read_text())

    @tried(examples)
    @given(st.one_of(mutated(json.dumps(good).encode()), mutated_tree(good).map(dumped)))
    def read(content: bytes) -> None:
        path.write_bytes(content)
        refused(CheckpointError, lambda: read_json_object(path), path)
        config = refused(CheckpointError, lambda: TransformerConfig.from_json(path), path)
        if config is not None:
            assert 0 < config.n_layers <= 1024 and 0 < config.dim <= 2**24

    read()


def dumped(tree: object) -> bytes:
    return json.dumps(tree).encode()


# Names as trainers write them, in pieces that are put together in any order.
PIECES = st.sampled_from(
    [
        *("transformer", "model", "diffusion_model", "base_model", "lora_unet_", "processor"),
        *("layers", "0", "attention", "feed_forward", "to_q", "qkv", "w1", "_", "-", ""),
        *("lora_A", "lora_B", "lora_down", "lora_up", "weight", "bias", "alpha", "default"),
        *("hada_w1_a", "lokr_w1", "dora_scale", "diff"),
    ]
)
KEYS = st.one_of(
    st.lists(PIECES, min_size=1, max_size=12).map(".".join),
    st.lists(PIECES, min_size=1, max_size=12).map("_".join),
    st.text(max_size=60),
)


@EXAMPLES
def test_lora_keys(tmp_path: Path, examples: int) -> None:
    model = empty_transformer(CONFIG)
    names = ModuleNames(model)
    path = tmp_path / "a.safetensors"

    @tried(examples)
    @given(st.lists(KEYS.filter(lambda key: key != "__metadata__"), max_size=6, unique=True))
    def read(keys: list[str]) -> None:
        for key in keys:
            split = split_key(key)
            assert split is None or key.startswith(split[0])
            found = None if split is None else names.find(split[0])
            for place in found[1] if found else ():
                assert f"{place.module}.weight" in names.shapes
            owner = names.owner(key)
            assert owner is None or f"{owner}.weight" in names.shapes
        good = {key: value for key, value in HEADER.items() if key.startswith(Q)}
        empty = {key: entry("F32", [0], 578, 578) for key in keys if key not in good}
        path.write_bytes(safetensors({**good, **empty}, DATA))
        report = refused(CheckpointError, lambda: check_lora(path, model), path)
        if report is not None:
            told = [*report.matched, *report.unmatched, *report.redundant]
            assert sorted(told) == sorted({**good, **empty})

    read()


ADAPTER = {"transformer.r": 4, "transformer.lora_alpha": 8.0, "transformer.use_rslora": False}
ADAPTER_PATTERNS = {"transformer.rank_pattern": {"to_q": 2}, "transformer.alpha_pattern": {"k": 1}}


@EXAMPLES
def test_lora_config(tmp_path: Path, examples: int) -> None:
    model = empty_transformer(CONFIG)
    path = tmp_path / "a.safetensors"

    @tried(examples)
    @given(mutated_tree({**ADAPTER, **ADAPTER_PATTERNS}))
    def read(config: object) -> None:
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        path.write_bytes(safetensors({**HEADER, "__metadata__": metadata}, DATA))
        refused(CheckpointError, lambda: check_lora(path, model), path)

    read()


# Tables and prompts.

CSV = b'id,prompt,age,seed\n1,"a cat, on a mat",34,7\n2,a dog,28,\n\n3,"two\nlines",1.5,9\n'


@EXAMPLES
def test_csv(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "t.csv"

    @tried(examples)
    @given(mutated(CSV))
    def read(content: bytes) -> None:
        path.write_bytes(content)
        check_table(refused(ProfileError, lambda: read_profiles(path), path))

    read()


def check_table(table: Any) -> None:
    """Rows of a table that was read can be asked for as prompts, or refused by their cells."""
    if table is None:
        return
    assert len(table.rows) == len(table.row_numbers) > 0
    assert len(set(table.columns)) == len(table.columns)
    for row in range(len(table)):
        assert list(table.rows[row]) == list(table.columns)
        fields = refused(ProfileError, lambda row=row: table.prompt_fields(row), table.path)
        if fields is not None:
            Prompt("a cat", metadata=table.rows[row], **fields)


def sheet() -> dict[str, bytes]:
    book = openpyxl.Workbook()
    for row in (["id", "prompt", "age"], [1, "a cat", 34], [2, "a dog", 1.5]):
        book.active.append(row)
    buffer = io.BytesIO()
    book.save(buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@EXAMPLES
def test_xlsx(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "t.xlsx"
    parts = sheet()
    changed = st.sampled_from(sorted(parts)).flatmap(
        lambda name: mutated(parts[name]).map(lambda content: zipped({**parts, name: content}))
    )

    @tried(examples)
    @given(st.one_of(changed, mutated(zipped(parts))))
    def read(content: bytes) -> None:
        path.write_bytes(content)
        check_table(refused(ProfileError, lambda: read_profiles(path), path))

    read()


@EXAMPLES
def test_template(tmp_path: Path, examples: int) -> None:
    braces = st.text(st.sampled_from("{}ab .[]!:_0"), max_size=20)

    @tried(examples)
    @given(st.one_of(braces, st.text(max_size=30), JUNK))
    def read(template: object) -> None:
        parts = refused(ValueError, lambda: parse_template(template), "template")
        if parts is None:
            return
        for _, name in parts:
            assert name is None or (name and not set(name) & set("{}.[]!:"))
        # what str.format makes of plain names, without its way into objects
        values = {name: "<{0.__class__}>" for _, name in parts if name}
        filled = "".join(literal + (values[name] if name else "") for literal, name in parts)
        written = {name for _, name, _, _ in string.Formatter().parse(str(template)) if name}
        # white space in a name is evened out, and a number is a column's name too
        if written == set(values) and not any(name.isdecimal() for name in values):
            assert filled == string.Formatter().vformat(str(template), (), values)

    read()


# The job file.


@EXAMPLES
def test_job_file(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "job.yaml"
    good = yaml.safe_load(JOB)

    @tried(examples)
    @given(
        st.one_of(
            mutated(JOB.encode()),
            mutated_tree(good).map(lambda tree: yaml.safe_dump(tree).encode()),
        )
    )
    def read(content: bytes) -> None:
        path.write_bytes(content)
        config = refused(JobFileError, lambda: load_job(path), "job.yaml")
        if config is not None:
            assert JobConfig.model_validate_json(config.model_dump_json()) == config

    read()


@EXAMPLES
def test_value_of_a_flag(examples: int) -> None:
    letters = st.text(st.sampled_from("{}[]&*!|>'\"%@`,:#- \n0x1e.ab<~?"), max_size=25)

    @tried(examples)
    @given(st.one_of(letters, st.text(max_size=25)))
    def read(value: str) -> None:
        refused(YamlFileError, lambda: read_value(value))

    read()


# Outputs.

NAME = "00000012-r003-b0001-0003of0004-n00064-f00002-p00001-e000001.parquet"


@EXAMPLES
def test_names_of_parts(examples: int) -> None:
    numbers = st.integers(0, 10**12)

    @tried(examples)
    @given(
        st.one_of(
            mutated(NAME.encode()).map(lambda name: name.decode(errors="replace")),
            st.text(max_size=40),
            st.text(st.sampled_from("0123456789\u0661\u00b2"), min_size=8, max_size=9).map(
                lambda digits: digits + NAME[8:]
            ),
        ),
        st.tuples(*[numbers] * 9),
    )
    def read(name: str, values: tuple[int, ...]) -> None:
        part = refused(ValueError, lambda: PartName.parse(name))
        assert part is None or str(part) == name  # one part has one name
        assert PartName.parse(str(PartName(*values))) == PartName(*values)

    read()


def good_record() -> dict[str, Any]:
    config = JobConfig.model_validate_json(json.dumps(yaml.safe_load(JOB)))
    record = JobRecord(
        config=json.loads(config.model_dump_json()),
        settings=Settings("cpu", "float32", "native", False, "none", 8, 1, "m", "sha256:0"),
        prompts=PromptSource("avatars", "{}", "0", None),
        plan=new_plan(0, 8, 4).extended_to(12, 4),
        versions={"python": "3"},
        created_at="2026-01-01T00:00:00+00:00",
        updated_at="2026-01-01T00:00:00+00:00",
        command=("zimage", "run", "job.yaml"),
    )
    return json.loads(record.dump())


@EXAMPLES
def test_record(tmp_path: Path, examples: int) -> None:
    storage = Storage(str(tmp_path))
    good = good_record()

    @tried(examples)
    @given(st.one_of(mutated(dumped(good)), mutated_tree(good).map(dumped)))
    def read(content: bytes) -> None:
        (tmp_path / "job.json").write_bytes(content)
        record = refused(StorageError, lambda: read_record(storage), "job.json")
        if record is not None:
            assert read_again(storage, record) == record
            assert sum(len(record.plan.shard(i)) for i in range(min(record.plan.num_shards, 9)))

    (tmp_path / "job.json").write_bytes(dumped(good))
    assert read_record(storage) is not None
    read()


def read_again(storage: Storage, record: JobRecord) -> JobRecord | None:
    assert storage.root is not None
    (storage.root / "job.json").write_bytes(record.dump())
    return read_record(storage)


TIME = "2026-01-01T00:00:00+00:00"
EVENTS = [
    {"event": "epoch", "time": TIME, "epoch": 1, "host": "h", "pid": 7, "started": 1.0,
     "nonce": "n"},
    {"event": "worker_ready", "time": TIME, "worker": "w", "node": "n", "device": "cpu", "pid": 7},
    {"event": "commit", "time": TIME, "part": NAME},
    {"event": "end", "time": TIME},
]  # fmt: skip


@EXAMPLES
def test_events(tmp_path: Path, examples: int) -> None:
    storage = Storage(str(tmp_path))
    (tmp_path / "events").mkdir()
    path = tmp_path / "events/000001-00000.jsonl"

    def lines(entries: object) -> bytes:
        each = entries if isinstance(entries, list) else [entries]
        return "".join(json.dumps(entry) + "\n" for entry in each).encode()

    @tried(examples)
    @given(st.one_of(mutated(lines(EVENTS)), mutated_tree(EVENTS).map(lines)))
    def read(content: bytes) -> None:
        path.write_bytes(content)
        refused(StorageError, lambda: read_events(storage), "events/000001-00000.jsonl")
        claim = refused(StorageError, lambda: newest_claim(storage), "events/000001-00000.jsonl")
        assert claim is None or is_alive(claim) in (True, False)

    read()


PATHS = st.lists(
    st.sampled_from(["..", ".", "a", "b.png", "", "~", "link", "up", "\0", "\\", "a\n", "x" * 300]),
    max_size=5,
).map("/".join)


@EXAMPLES
def test_names_of_files(tmp_path: Path, examples: int) -> None:
    """Whatever a row or a cell names, nothing outside of the folder is read."""
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "b.png").write_bytes(b"inside")
    (out / "a/b.png").write_bytes(b"inside")
    (tmp_path / "b.png").write_bytes(b"outside")
    (out / "link").symlink_to(tmp_path / "b.png")
    storage = Storage(str(out))
    small = st.one_of(st.none(), st.integers(-3, 9), st.sampled_from([2**40, 2**62, 2**63 - 1]))

    @tried(examples)
    @given(st.one_of(PATHS, st.text(max_size=10)), st.booleans(), small, small)
    def read(name: str, in_tar: bool, offset: int | None, size: int | None) -> None:
        path = refused(ImageFileError, lambda: path_below(out, name))
        assert path is None or path.is_relative_to(out)
        row = {"file_name": name, "bytes": size, "tar": None, "tar_offset": None}
        if in_tar:
            row |= {"tar": name, "tar_offset": offset}
        found = refused(StorageError, lambda: read_image_bytes(storage, row))
        # links are followed, as folders of an output may be links to another disk
        assert found is None or "link" in name or found in b"inside"

    read()


@EXAMPLES
def test_cells_of_an_exported_table(examples: int) -> None:
    from jobs.export import _cell

    cells = st.one_of(st.text(max_size=20), st.text(st.sampled_from("=+-@\t\r\n a1'"), max_size=8))

    @tried(examples)
    @given(st.lists(cells, min_size=1, max_size=4))
    def written(values: list[str]) -> None:
        buffer = io.StringIO(newline="")
        csv.writer(buffer).writerow([_cell(value) for value in values])
        (back,) = csv.reader(io.StringIO(buffer.getvalue(), newline=""))
        for cell, value in zip(back, values, strict=True):
            assert cell in (value, f"'{value}")
            start = cell.strip("\0 \t\r\n\u00a0")[:1]
            if start and start in "=+-@":
                float(cell)  # a number

    written()


def test_names_of_jobs_are_names_of_files() -> None:
    @tried(200)
    @given(st.from_regex(NAME_PATTERN, fullmatch=True))
    def read(name: str) -> None:
        file = f"{name}_00000000.png"
        assert Path(file).name == file and not file.startswith((".", "-")) and len(file) < 100

    read()
