"""The page on other tools: its code runs as it stands, its tables name what there is."""

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from jobs.cli import main
from jobs.config import JobConfig, ModelConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/take-over.md").read_text(encoding="utf-8")
GENERATOR = """
from prompt_generators.avatars import AvatarGenerator

class People(AvatarGenerator):
    def generate_prompt(self, index):
        if index == 2:
            raise ValueError("the third is incomplete")
        return super().generate_prompt(index)
"""
JOB = f"""
extends: {ROOT}/configs/z-image-tiny.yaml
name: avatars
prompts:
  generator: take_over_people:People
  profiles: {ROOT}/data/profiles/avatars.csv
  count: 4
sampling: {{width: 32, height: 32, num_inference_steps: 1, batch_size: 4}}
output: {{uri: output/avatars, shard_size: 4}}
"""


def block(words: str, language: str = "python") -> str:
    """The one block of the page that has these words."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (found,) = [text for text in blocks if words in text]
    return found


def run_block(words: str) -> dict[str, Any]:
    """Its names, after it was run in the working directory."""
    names: dict[str, Any] = {}
    exec(compile(block(words), "docs/take-over.md", "exec"), names)
    return names


def table(heading: str) -> list[list[str]]:
    """Cells of the table below a heading row that begins so."""
    lines = PAGE.split(f"\n| {heading}", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an output of 4 samples, of which index 2 failed."""
    folder = tmp_path_factory.mktemp("take_over")
    (folder / "take_over_people.py").write_text(GENERATOR)
    (folder / "avatars.yaml").write_text(JOB)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        assert run_job() == 3
        yield folder


def run_job(*flags: str) -> int:
    return main(["run", "avatars.yaml", "--local", *flags])


@pytest.fixture(autouse=True)
def in_folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


def test_pandas_and_duckdb_find_the_failed_sample() -> None:
    names = run_block('pandas.read_parquet("output/avatars/')
    assert names["causes"][["index", "error_type"]].values.tolist() == [[2, "prompt_error"]]
    assert names["per_job"].sum() == names["made"]["profile_occupation"].notna().sum() > 0
    assert run_block("errors = ")["errors"] == [("prompt_error", 1, [2])]


@pytest.mark.slow
def test_the_manifest_has_one_current_row_for_each_index() -> None:
    assert run_job("--retry-failed") == 3
    parts = sorted(Path("output/avatars/manifest").iterdir())
    assert ["-r000-" in part.name for part in parts].count(False) == 1  # the failed one, again
    import duckdb

    names: dict[str, Any] = {"duckdb": duckdb}
    exec(block("union_by_name"), names)
    current = names["current"].sort_values("index")
    assert list(current["index"]) == [0, 1, 2, 3]
    assert list(current["revision"]) == [0, 0, 1, 0]


def test_datasets_reads_the_images_that_were_made() -> None:
    names = run_block("load_dataset(")
    assert sorted(names["images"]["index"]) == [0, 1, 3]
    assert all(image.size == (32, 32) for image in names["images"]["image"])


@pytest.mark.slow
def test_webdataset_reads_the_images_that_were_made() -> None:
    tars = ["--output", "output/avatars-tars", "--set", "output.layout=webdataset"]
    assert run_job(*tars) == 3
    pairs = list(run_block("import webdataset")["pairs"])
    assert [pixels.shape for pixels, _ in pairs] == [(32, 32, 3)] * 3
    rows = run_block('pandas.read_parquet("output/avatars/')["made"]
    assert [text for _, text in pairs] == list(rows.sort_values("index")["prompt"])


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_reads_rows_and_images(made: Path) -> None:
    code = "import ray; ray.init(num_cpus=2, include_dashboard=False)\n" + block("ray.data")
    code += "\nprint(sorted(row['index'] for row in sizes.take_all() if row['width'] == 32))"
    (made / "sizes.py").write_text(code)
    ended = subprocess.run(
        [sys.executable, "sizes.py"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.stdout.splitlines()[-1:] == ["[0, 1, 3]"], ended.stderr


def test_an_export_with_the_card_is_a_dataset() -> None:
    from datasets import load_dataset

    assert main(["export", "output/avatars", "avatars-dataset"]) == 0
    Path("avatars-dataset/README.md").write_text(block("pretty_name", "yaml"))
    # in a cache of its own: that of the user may know a folder of this name, at another place
    images = load_dataset("./avatars-dataset", split="train", cache_dir="cache")
    assert sorted(images["index"]) == [0, 1, 3]
    assert {"image", "prompt", "profile_occupation"} <= set(images.column_names)
    assert images[0]["image"].size == (32, 32)


@pytest.mark.slow
def test_hf_has_the_command() -> None:
    """Nothing is sent: only that the installed client knows the arguments."""
    (line,) = re.findall(r"^hf (upload .*)$", PAGE, re.MULTILINE)
    assert line.split()[-2:] == ["--repo-type", "dataset"]
    program = Path(sys.executable).with_name("hf")
    help_page = subprocess.run([program, "upload", "--help"], capture_output=True, text=True)
    assert "REPO_ID" in help_page.stdout and "[PATH_IN_REPO]" in help_page.stdout
    assert "--repo-type" in help_page.stdout and "dataset" in help_page.stdout


def job_keys() -> set[str]:
    fields = JobConfig.model_fields
    sections = {name: field.annotation for name, field in fields.items()}
    return {
        f"{name}.{key}"
        for name, section in sections.items()
        for key in getattr(section, "model_fields", ())
    }


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_arguments_of_diffusers_exist_on_both_sides() -> None:
    import diffusers

    import zimage_core

    kinds = (
        diffusers.ZImagePipeline,
        diffusers.ZImageImg2ImgPipeline,
        diffusers.ZImageInpaintPipeline,
    )
    theirs = {
        name: parameter for kind in kinds for name, parameter in _parameters(kind.__call__).items()
    }
    ours = _parameters(zimage_core.generate)
    rows = table("`ZImagePipeline` and its kind |")
    listed = [name for row in rows for name in code_in(row[0])]
    assert set(listed) == set(theirs) - {"self"} - _OF_NO_MATTER
    for there, here, keys in rows:
        assert set(code_in(here)) <= set(ours)
        assert set(code_in(keys)) <= job_keys() | {"image_column"}
        for cell, parameters in ((there, _parameters(kinds[0].__call__)), (here, ours)):
            for default in re.findall(r"\((\d[\d.]*)\)", cell):
                (name,) = code_in(cell)
                assert parameters[name].default == float(default), cell
    strength = [_parameters(kind.__call__)["strength"].default for kind in kinds[1:]]
    assert strength == [0.6, 1.0]
    assert ours["strength"].default == 0.6


# how a result is wrapped, and what goes with arguments that the last row names
_OF_NO_MATTER = {"return_dict", "callback_on_step_end_tensor_inputs", "masked_image_latents"}


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_methods_of_diffusers_exist_on_both_sides() -> None:
    import diffusers

    import zimage_core

    for there, here, keys in table("diffusers | in Python"):
        for name in code_in(there):
            assert hasattr(diffusers.ZImagePipeline, name) or hasattr(
                diffusers.ZImageTransformer2DModel, name
            ), name
        for call in code_in(here):
            name, _, arguments = call.rstrip(")").partition("(")
            parameters = _parameters(getattr(zimage_core, name))
            for argument in filter(None, re.split(r", ", arguments)):
                assert argument.partition("=")[0] in parameters, call
        assert set(code_in(keys)) <= job_keys()


def test_names_of_the_original_repository_are_ours_too() -> None:
    import zimage_core

    cells = table("there | here |")
    names = code_in(cells[2][0])
    assert len(names) == 4
    assert set(names) <= set(zimage_core.__all__)
    assert {*code_in(cells[3][0]), "auto"} == set(
        get_args(ModelConfig.model_fields["attention"].annotation)
    )


def test_a_text_file_of_prompts_becomes_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.job_file import load_job
    from prompt_generators.table import TableGenerator

    prompts = ['a "red", round apple', "= a sum", "ein Löwe"]
    Path("prompts.txt").write_text("\n".join([*prompts[:2], "", prompts[2]]) + "\n", "utf-8")
    run_block("prompts.txt")
    Path("prompts.yaml").write_text(block("name: prompts", "yaml"))
    config = load_job("prompts.yaml")
    assert (config.sampling.seed, config.prompts.generator) == (42, "table")
    generator = TableGenerator(config.prompts.profiles)
    assert [generator.generate_prompt(i).text for i in range(len(generator))] == prompts
