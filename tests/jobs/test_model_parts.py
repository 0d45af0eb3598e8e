"""Jobs and commands that take models from files of their own."""

import json
import shutil

import foreign_layouts as foreign
import huggingface_hub.constants
import pyarrow.parquet as pq
import pytest
import torch
from cli_calls import CommandLine
from hub_server import REPO, serve

from jobs.fingerprint import node_fingerprint
from jobs.job_file import read_job
from jobs.submission import lost_on_the_way
from jobs.upload import collect
from zimage_core.tiny.make import make_checkpoint
from zimage_core.weights import ensure_model_weights, weights_fingerprint

SMALL = {"layers": 1, "text_layers": 2, "vocab_size": 320, "vae_channels": (8, 8, 8, 8)}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("origin") / "tiny", dtype=torch.float32, seed=1, **SMALL
    )


@pytest.fixture
def job(zimage: CommandLine, origin):
    """A job on a checkpoint of other weights, with the origin's transformer as a file."""
    make_checkpoint(zimage.folder / "base", dtype=torch.float32, seed=2, **SMALL)
    state = foreign.comfy_transformer(foreign.transformer_state(origin))
    foreign.save(state, zimage.folder / "t.safetensors")
    zimage.write(
        "job.yaml",
        """
name: t
model: {path: base, dtype: float32, transformer: t.safetensors}
prompts: {generator: avatars, count: 2}
sampling: {width: 32, height: 32, num_inference_steps: 1}
output: {uri: out, shard_size: 2}
""",
    )
    return zimage


def pixels(folder):
    return pq.read_table(folder / "metadata.parquet").to_pydict()["pixels_sha256"]


def test_job_uses_the_file_and_says_so(job: CommandLine, origin):
    job.run(code=0)
    rows = pq.read_table(job.folder / "out" / "metadata.parquet").to_pylist()
    assert {row["model"] for row in rows} == {"base with transformer t.safetensors"}
    fingerprint = weights_fingerprint(job.folder / "base", transformer=job.folder / "t.safetensors")
    assert {row["model_fingerprint"] for row in rows} == {fingerprint}
    whole = shutil.copytree(job.folder / "base", job.folder / "whole")
    shutil.copytree(origin / "transformer", whole / "transformer", dirs_exist_ok=True)
    job.run("--set", "model={path: whole, transformer: null}", "--output", "same", code=0)
    job.run("--set", "model.transformer=null", "--output", "other", code=0)
    made = pixels(job.folder / "out")
    assert made == pixels(job.folder / "same")
    assert set(made).isdisjoint(pixels(job.folder / "other"))


def test_file_is_pinned_by_content(job: CommandLine, origin):
    job.run(code=0)
    (job.folder / "t.safetensors").rename(job.folder / "moved.safetensors")
    moved = ("--set", "model.transformer=moved.safetensors", "--count", 3)
    job.run(*moved, code=0)
    state = foreign.comfy_transformer(foreign.transformer_state(origin))
    state["x_pad_token"] = state["x_pad_token"] + 1
    foreign.save(state, job.folder / "moved.safetensors")
    ended = job.run(*moved, code=2)
    assert "model weights: was sha256:" in ended.err
    ended = job.run("--set", "model.transformer=null", "--count", 4, code=2)
    assert "model weights: was sha256:" in ended.err


def test_plan_checks_the_file_and_names_its_key(job: CommandLine):
    report = json.loads(job("plan", "job.yaml", "--json", code=0).out)
    path = job.folder / "t.safetensors"
    assert report["model"]["parts"] == {"transformer": str(path)}
    assert report["model"]["notes"] == []
    assert f"transformer from {path}" in job("plan", "job.yaml", code=0).out
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    ended = job("plan", "job.yaml", code=5)
    assert f"job.yaml: model.transformer: {path}: is truncated" in ended.err
    ended = job.run(code=5)
    assert f"model.transformer: {path}: is truncated" in ended.err
    path.unlink()
    ended = job("plan", "job.yaml", code=5)
    assert f"job.yaml: model.transformer: {path}: no such file" in ended.err
    ended = job("plan", "job.yaml", "--set", "model.vae=''", code=2)
    assert "--set: model.vae: value ''" in ended.err


@pytest.mark.long
def test_notes_are_shown(job: CommandLine, origin):
    state = foreign.transformer_state(origin)
    state["norm_final.weight"] = torch.zeros(64)
    path = foreign.save(state, job.folder / "t.safetensors")
    note = f"{path}: tensor 'norm_final.weight' is left out: it is of no use"
    assert f"NOTE: {note}" in job("plan", "job.yaml", code=0).out
    ended = job("doctor", "--model", "base", "--transformer", path, code=0)
    assert f"note: {note}" in ended.out
    report = json.loads(
        job("doctor", "--model", "base", "--transformer", path, "--json", code=0).out
    )
    assert report["model"]["ok"] and report["model"]["notes"] == [note]


def test_doctor_names_a_broken_part(job: CommandLine):
    path = job.folder / "t.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    report = json.loads(
        job("doctor", "--model", "base", "--transformer", path, "--json", code=0).out
    )
    assert not report["model"]["ok"] and f"{path}: is truncated" in report["model"]["error"]
    ended = job("doctor", "--vae", path, code=2)
    assert f"--vae: {path}: needs --model" in ended.err


def test_generate_takes_files(job: CommandLine, origin):
    ae = foreign.save(
        foreign.ldm_autoencoder(foreign.vae_state(origin)), job.folder / "ae.safetensors"
    )
    text = foreign.save(foreign.text_state(origin), job.folder / "q.safetensors")
    common = ("--prompt", "a", "--width", 32, "--height", 32, "--steps", 1)
    common = (*common, "--embed-metadata", "none")  # which would name the files
    parts = ("--transformer", "t.safetensors", "--vae", ae, "--text-encoder", text)
    job("generate", "--model", "base", *parts, *common, "-o", "parts.png", code=0)
    job("generate", "--model", origin, *common, "-o", "whole.png", code=0)
    assert (job.folder / "parts.png").read_bytes() == (job.folder / "whole.png").read_bytes()
    ended = job("generate", "--model", "base", "--vae", "none", *common, "-o", "x.png", code=5)
    assert "none: no such autoencoder; allowed: a file or a folder" in ended.err


def test_submit_refuses_a_file_that_is_not_uploaded(job: CommandLine):
    config, layers = read_job(job.folder / "job.yaml", sets=["output.uri=/shared/out"])
    assert lost_on_the_way(config, layers, collect(job.folder)) == []
    (job.folder / ".hidden.safetensors").write_bytes(b"x")
    config, layers = read_job(
        job.folder / "job.yaml",
        sets=["output.uri=/shared/out", "model.transformer=.hidden.safetensors"],
    )
    (line,) = lost_on_the_way(config, layers, collect(job.folder))
    assert line.startswith("--set: model.transformer: value '.hidden.safetensors': the cluster")


def test_fingerprint_is_of_content_and_role(origin, tmp_path, monkeypatch):
    base = make_checkpoint(tmp_path / "base", dtype=torch.float32, seed=2, **SMALL)
    path = foreign.save(foreign.transformer_state(origin), tmp_path / "a.safetensors")
    known = weights_fingerprint(base, transformer=path)
    assert known != weights_fingerprint(base)
    moved = shutil.copy(path, tmp_path / "b.safetensors")
    assert weights_fingerprint(base, transformer=moved) == known
    # A model's own folder counts as if it lay in the checkpoint.
    whole = shutil.copytree(base, tmp_path / "whole")
    shutil.rmtree(whole / "vae")
    shutil.copytree(origin / "vae", whole / "vae")
    assert weights_fingerprint(base, vae=origin / "vae") == weights_fingerprint(whole)
    monkeypatch.setattr("jobs.fingerprint._REMEMBER_FROM", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for _ in range(2):
        assert node_fingerprint(base, transformer=path) == known
    assert node_fingerprint(base) == weights_fingerprint(base)


def test_folder_without_the_replaced_weights_is_complete(origin, tmp_path):
    base = make_checkpoint(tmp_path / "base", dtype=torch.float32, seed=2, **SMALL)
    path = foreign.save(foreign.transformer_state(origin), tmp_path / "a.safetensors")
    (base / foreign.TRANSFORMER).unlink()
    assert ensure_model_weights(base, transformer=path) == base
    with pytest.raises(ValueError, match="file is missing"):
        ensure_model_weights(base)


def test_replaced_weights_are_not_fetched(origin, tmp_path, monkeypatch):
    server = serve(origin)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    part = foreign.save(foreign.transformer_state(origin), tmp_path / "a.safetensors")
    folder = tmp_path / "new"
    try:
        with pytest.raises(ValueError, match="none: no such transformer"):
            ensure_model_weights(folder, REPO, transformer=tmp_path / "none")
        assert not server.paths
        assert ensure_model_weights(folder, REPO, transformer=part) == folder
        assert "transformer/config.json" in server.paths
        assert foreign.TRANSFORMER not in server.paths
        sent = len(server.sent)
        assert ensure_model_weights(folder, REPO, transformer=part) == folder
        assert len(server.sent) == sent
        # A job without the file fetches the rest, and only that.
        ensure_model_weights(folder, REPO)
        assert {request.path for request in server.sent[sent:]} == {foreign.TRANSFORMER}
    finally:
        server.close()
    assert weights_fingerprint(folder) == weights_fingerprint(origin)
