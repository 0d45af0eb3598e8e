"""`zimage init`: what it sees in a table, what it proposes, and that the job file is always one."""

import io
import json
import sys
from pathlib import Path

import openpyxl
import pytest
import yaml
from cli_calls import CHECKPOINT, CommandLine
from hypothesis import example, given, settings
from hypothesis import strategies as st
from job_runs import ROOT
from PIL import Image

from jobs import init_job
from jobs.job_draft import JobDraft, job_name, scalar
from jobs.job_file import load_job
from jobs.plan import job_generator, num_prompts
from jobs.proposal import prompt_columns, propose
from jobs.table_view import columns_of
from jobs.yaml_file import read_value
from prompt_generators import prompt_at, read_profiles

PEOPLE = "age,gender,hair_color,city\n34,woman,black,Paris\n41,man,,Rome\n"
PETS = "Pet_ID,Species,Coat Colour,Age,Mood,Notes,photo\n1,dog,brown,3,happy,ok,a.png\n"


def workbook(path: Path, **sheets: list[list[object]]) -> None:
    book = openpyxl.Workbook()
    book.remove(book.worksheets[0])
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)


@pytest.mark.parametrize("name", ["food.csv", "gaming.csv"])
def test_shipped_tables_get_their_generator(zimage: CommandLine, name: str) -> None:
    out = zimage("init", ROOT / "data/profiles" / name, code=0).out
    stem = name.removesuffix(".csv")
    assert f"generator {stem}: it knows " in out
    assert load_job(zimage.folder / f"{stem}.yaml").prompts.generator == stem


def test_what_it_writes_is_what_it_showed(zimage: CommandLine) -> None:
    name = "avatars"
    table = ROOT / "data/profiles/avatars.xlsx"
    out = zimage("init", table, "-o", "jobs/mine.yaml", "--yes", code=0).out
    assert f"generator {name}: it knows " in out and "id: an id" in out
    job = yaml.safe_load((zimage.folder / "jobs/mine.yaml").read_text())
    rows = len(read_profiles(table))
    assert job["extends"] == "z-image-turbo" and job["name"] == name
    assert job["prompts"]["generator"] == name and job["prompts"]["count"] == rows
    assert job["prompts"]["sheet"] == read_profiles(table).sheet
    plan = json.loads(zimage("plan", "jobs/mine.yaml", "--json", code=0).out)
    assert plan["samples"] == rows
    shown = [line.strip() for line in out.splitlines()]
    for prompt in plan["prompts"]:
        assert f"{prompt['index']}  {prompt['prompt']}" in shown


def test_template_from_column_names(zimage: CommandLine) -> None:
    zimage.write("pets.csv", PETS)
    out = zimage("init", "pets.csv", code=0).out
    prompt = "Picture of dog, 3 years old, happy mood, brown coat"
    assert f"  0  {prompt}\n" in out
    assert "not used  Pet_ID: an id" in out and "photo: image files" in out
    job = yaml.safe_load((zimage.folder / "pets.yaml").read_text())
    assert job["prompts"]["options"] == {
        "template": "Picture of {Species}, {Age} years old, {Mood} mood, {Coat Colour} coat"
    }
    assert prompt in zimage("plan", "pets.yaml", code=0).out


def test_empty_cells_of_a_template_are_said_and_read(zimage: CommandLine) -> None:
    zimage.write("shop.csv", "product,color,price\nmug,red,3\ncup,,4\npot,blue,5\n")
    out = zimage("init", "shop.csv", code=0).out
    assert "note      cells are empty in 'color' (1): they read as the option `missing`" in out
    assert "Picture of  cup" in zimage("plan", "shop.yaml", code=0).out


def test_other_spellings_are_named_instead_of_ignored(zimage: CommandLine) -> None:
    zimage.write("p.csv", PEOPLE.replace("hair_color", "Hair Colour"))
    out = zimage("init", "p.csv", code=0).out
    assert "generator template" in out
    assert "the generator avatars would know the columns 'Hair Colour' as 'hair_color'" in out
    assert "Portrait of a woman, 34 years old, black hair, in Paris" in out


def test_prompts_of_a_table(zimage: CommandLine) -> None:
    table = "nr,prompt,Seed,negative\n1,a red fox,7,blurred\n2,a blue bird,8,text\n"
    zimage.write("t.csv", table)
    out = zimage("init", "t.csv", code=0).out
    assert "generator table: column 'prompt' holds the prompts" in out
    job = load_job(zimage.folder / "t.yaml")
    prompt = prompt_at(job_generator(job), 1)
    assert (prompt.text, prompt.seed, prompt.negative_text) == ("a blue bird", 8, "text")


def terminal(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    answers = io.StringIO(typed)
    monkeypatch.setattr(answers, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", answers)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)


@pytest.mark.parametrize(
    ("typed", "flags", "taken", "said"),
    [
        ("2\n", (), "prompt_v2", "Which column holds the prompts?"),
        ("\n", (), "prompt", "Which column holds the prompts?"),
        ("9\nprompt_v2\n", (), "prompt_v2", "'9': allowed: 1 to 2"),
        ("", (), "prompt", "Which column holds the prompts?"),
        ("2\n", ("--yes",), "prompt", "column 'prompt' taken (--yes); also possible: 'prompt_v2'"),
        (None, (), "prompt", "column 'prompt' taken (no terminal to ask on); also possible"),
    ],
)
def test_asks_only_on_a_terminal(
    zimage: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    typed: str | None,
    flags: tuple[str, ...],
    taken: str,
    said: str,
) -> None:
    zimage.write("t.csv", "prompt_v2,prompt\na cat,a dog\n")
    if typed is not None:
        terminal(monkeypatch, typed)
    assert said in zimage("init", "t.csv", *flags, code=0).out
    options = load_job(zimage.folder / "t.yaml").prompts.options
    assert options.get("column", "prompt") == taken


def test_no_answer_is_no_job(zimage: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    zimage.write("t.csv", "prompt_v2,prompt\na cat,a dog\n")
    terminal(monkeypatch, "x\ny\nz\n")
    assert "No answer among 1 to 2 in 3 tries" in zimage("init", "t.csv", code=2).err
    assert not (zimage.folder / "t.yaml").exists()


def test_sheets(zimage: CommandLine) -> None:
    people = [line.split(",") for line in PEOPLE.splitlines()]
    sheets = {
        "cover": [["Our people"], ["of 2026"]],
        "sums": [["a", "b"], [1, "=A2"]],
        "old": [*people, ["51", "man", "grey", "Oslo"]],
        "new": people,
    }
    workbook(zimage.folder / "p.xlsx", **sheets)
    out = zimage("init", "p.xlsx", code=0).out
    assert "sheet 'old' taken (no terminal to ask on); also possible: 'new'\n" in out
    assert "sheet 'sums': no table of profiles (row 2: a formula, which is never eval" in out
    prompts = load_job(zimage.folder / "p.yaml").prompts
    assert (prompts.sheet, prompts.count) == ("old", 3)
    out = zimage("init", "p.xlsx", "--sheet", "new", "-o", "n.yaml", code=0).out
    assert "taken" not in out
    prompts = load_job(zimage.folder / "n.yaml").prompts
    assert (prompts.sheet, prompts.count) == ("new", 2)
    workbook(zimage.folder / "one.xlsx", new=people, empty=[])
    assert "taken" not in zimage("init", "one.xlsx", code=0).out  # nothing to choose from


def test_never_replaces_a_file(zimage: CommandLine) -> None:
    zimage.write("p.csv", PEOPLE)
    zimage.write("p.yaml", "mine")
    err = zimage("init", "p.csv", code=2).err
    assert err == "zimage init: p.yaml: is there already; allowed: another -o FILE, or --force\n"
    assert (zimage.folder / "p.yaml").read_text() == "mine"
    zimage("init", "p.csv", "--force", code=0)
    assert load_job(zimage.folder / "p.yaml").name == "p"
    assert not list(zimage.folder.glob(".*.part"))


def test_an_output_that_is_there_is_left_alone(zimage: CommandLine) -> None:
    zimage.write("p.csv", PEOPLE)
    zimage.write("output/p/job.json", "someone else's")
    zimage.write("output/p-2-dry/job.json", "someone else's")
    zimage("init", "p.csv", code=0)
    assert load_job(zimage.folder / "p.yaml").output.uri == "output/p-3"
    zimage("plan", "p.yaml", code=0)


@pytest.mark.parametrize(
    ("arguments", "table", "words"),
    [
        (("p.csv", "-o", "p.txt"), PEOPLE, "--output: p.txt: allowed: a name that ends in .yaml"),
        (("p.csv", "-o", "d.yaml"), PEOPLE, "--output: d.yaml: is a folder; allowed: a file"),
        (("gone.csv",), PEOPLE, "gone.csv: no such file"),
        (("p.csv", "--sheet", "x"), PEOPLE, "p.csv: a CSV file has no sheets, got 'x'"),
        (("p.csv",), "id,a\n1,x\n1,y\n", "row 3, column 'id': the same id as in row 2, got 1"),
        (("p.csv",), PEOPLE.replace("34", "12"), "row 2, column 'age': not a whole number in ran"),
        (("p.csv",), "prompt,n\na cat,1\n,2\n", "row 3, column 'prompt': the prompt is empty"),
        (("p.csv",), "id,n\n1,2\n", "no column says what an image shows ('id': an id; 'n': whole"),
        (("p.csv",), "a,a\n1,2\n", "columns 1 and 2 have the same name"),
    ],
)
def test_mistakes_are_one_error(
    zimage: CommandLine, arguments: tuple[str, ...], table: str, words: str
) -> None:
    zimage.write("p.csv", table)
    (zimage.folder / "d.yaml").mkdir()
    err = zimage("init", *arguments, code=2).err
    assert words in err and len(err.splitlines()) == 1
    assert not list(zimage.folder.glob("p.*ml"))


def test_model_that_is_none(zimage: CommandLine) -> None:
    zimage.write("p.csv", PEOPLE)
    err = zimage("init", "p.csv", "--model", "nowhere", code=5).err
    assert "--model: nowhere: no such folder; allowed: a checkpoint folder" in err
    (zimage.folder / "empty").mkdir()
    assert "--model: " in zimage("init", "p.csv", "--model", "empty", code=5).err
    assert not (zimage.folder / "p.yaml").exists()


def test_with_a_model_it_makes_images_that_can_be_reported_on(zimage: CommandLine) -> None:
    zimage.write("p.csv", PEOPLE)
    out = zimage("init", "p.csv", "--model", CHECKPOINT, code=0).out
    assert "look      output/p-dry.png: the first images side by side" in out
    assert Image.open(zimage.folder / "output/p-dry.png").size == (268, 136)  # two of 128 x 128
    job = load_job(zimage.folder / "p.yaml")
    assert job.model.folder.samefile(CHECKPOINT) and job.model.repo is None
    assert (job.sampling.width, job.model.dtype) == (128, "float32")
    rows = zimage.rows("output/p-dry")
    assert [row["prompt"] for row in rows] == [
        prompt_at(job_generator(job), index).text for index in range(2)
    ]
    # what it proposes next goes on with what it made
    assert "--limit" not in out.partition("next  ")[2]
    again = zimage("run", "p.yaml", "--local", "--limit", "8", code=0).err
    assert "2 images kept, nothing to make" in again
    out = zimage("report", "output/p-dry", code=0).out
    assert "written   output/p-dry/report.html" in out and " images a second" in out
    page = (zimage.folder / "output/p-dry/report.html").read_text()
    assert "with workers, in 1 run" in page and "images a worker-hour, cpu" in page
    assert "loading of a worker, median and most" in page and "No sample failed." in page
    assert "svg+xml" not in page  # two images need no plot
    zimage("report", "output/p-dry", code=0)  # replaces its own
    zimage("verify", "output/p-dry", code=0)


@pytest.mark.parametrize(("shift", "preset"), [(3.0, "z-image-turbo"), (6.0, "z-image")])
def test_preset_of_a_large_model(
    zimage: CommandLine, monkeypatch: pytest.MonkeyPatch, shift: float, preset: str
) -> None:
    monkeypatch.setattr(init_job, "_SMALL", 0)  # so that the shipped one counts as large
    folder = zimage.folder / "ckpt"
    folder.mkdir()
    for entry in CHECKPOINT.iterdir():
        if entry.name != "scheduler":
            (folder / entry.name).symlink_to(entry)
    config = json.loads((CHECKPOINT / "scheduler/scheduler_config.json").read_text())
    zimage.write("ckpt/scheduler/scheduler_config.json", json.dumps(config | {"shift": shift}))
    zimage.write("p.csv", PEOPLE)
    out = zimage("init", "p.csv", "--model", "ckpt", code=0).out
    assert "no images: a model of this size takes long without a GPU" in out
    job = yaml.safe_load((zimage.folder / "p.yaml").read_text())
    assert (job["extends"], job["model"]) == (preset, {"path": "ckpt", "repo": None})


def test_paths_lead_to_the_table(zimage: CommandLine) -> None:
    zimage.write("p.csv", PEOPLE)
    zimage("init", "p.csv", "-o", "a/b/p.yaml", code=0)
    assert "profiles: ../../p.csv #" in (zimage.folder / "a/b/p.yaml").read_text()
    (zimage.folder / "deep/er").mkdir(parents=True)
    (zimage.folder / "link").symlink_to("deep/er")
    zimage("init", "p.csv", "-o", "link/p.yaml", code=0)  # `..` leads elsewhere there
    assert load_job(zimage.folder / "link/p.yaml").prompts.profiles == zimage.folder / "p.csv"
    zimage.write("~home.csv", PEOPLE)
    zimage("init", "~home.csv", code=0)
    zimage("plan", "home.yaml", code=0)


HOSTILE = [
    "{a}",
    "{",
    "a: b",
    "- a",
    "# a",
    "&a *b",
    "!!python/object:os.system",
    "'a\" b",
    "%YAML 1.2",
    "a\x1b]0;t\x07",
    "a\u202eb",
    "a\u2028b: c",
    "a\ufffeb",
    "=cmd|' /C calc'!A0",
    "@SUM(A1)",
    "null",
    "yes",
    "1e3",
    "~",
    "a\\x41",
    "\U0001f600 name",
    "a.b[0]",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(zimage: CommandLine, name: str) -> None:
    """Of a column, a sheet's cells and the file itself: the job file says them, and acts not."""
    quoted = '"' + name.replace('"', '""') + '"'
    stem = name.replace("/", "_")
    zimage.write(f"{stem}.csv", f"{quoted},species,hobby {quoted[1:-1]}\n{quoted},cat,{quoted}\n")
    ended = zimage("init", f"{stem}.csv", "-o", "job.yml", code=0)
    assert all(c.isprintable() or c == "\n" for c in ended.out + ended.err if ord(c) < 0xFFFE)
    text = (zimage.folder / "job.yml").read_text()
    for line in text.splitlines():
        assert all(c.isprintable() for c in line), line
    job = load_job(zimage.folder / "job.yml")
    assert job.prompts.profiles == zimage.folder / f"{stem}.csv"
    assert set(yaml.safe_load(text)) == {"extends", "name", "prompts", "sampling", "output"}
    assert num_prompts(job, job_generator(job)) == 1


names = st.text(st.characters(exclude_characters='\0\r\n"\\,'), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(st.lists(names, min_size=1, max_size=5), st.text(max_size=8))
@example(["{species}", "species"], "\x85")
@example(["a\u0085b", "\ud7ff", "\ue000"], "\u200b")
def test_any_columns_give_a_job_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, columns: list[str], cell: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    table = folder / "t.csv"
    values = [cell.replace('"', "").replace("\0", "") or "x" for _ in columns]
    rows = [columns, values]
    table.write_text(
        "\n".join(",".join(f'"{value}"' for value in row) for row in rows),
        encoding="utf-8",
        errors="replace",
        newline="",
    )
    try:
        profiles = read_profiles(table)
        seen = columns_of(profiles)
        proposal = propose(profiles, seen, next(iter(prompt_columns(seen)), None))
    except Exception as error:  # no table, or nothing in it to show
        assert type(error).__name__ in ("ProfileError", "InputError"), error
        return
    path = folder / "t.yaml"
    draft = JobDraft(
        path, job_name("t"), profiles, None, proposal, "z-image-turbo", None, "output/t"
    )
    path.write_text(draft.text(), encoding="utf-8")
    job = load_job(path)
    assert num_prompts(job, job_generator(job)) == len(profiles)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
@example("a\n# b")
@example(" x ")
@example("a #b")
def test_scalars_read_back(text: str) -> None:
    written = scalar(text)
    assert "\n" not in written and read_value(f"key: {written} # remark") == {"key": text}


@pytest.mark.parametrize(
    ("stem", "name"),
    [("people", "people"), ("Löwen & Bären", "Lowen-Baren"), ("..a", "a"), ("髙橋", "job")],
)
def test_job_names(stem: str, name: str) -> None:
    assert job_name(stem) == name
