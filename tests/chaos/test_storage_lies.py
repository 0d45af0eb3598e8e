"""A store that errs, loses its answers, claims what it did not do, or shows half of a file.

What can be promised differs. Errors and lost answers cost nothing. A store that says yes and has
written nothing is found out: the claim and the plan at once, a commit at the end of the run, an
image by `verify`. Half of a file under its final name is what folders, S3, GCS and Azure never
show; where it happens all the same a message says which file to delete, or nothing is lost.
"""

import signal
from pathlib import Path

import pytest
from output_checks import check_complete, check_visible

pytestmark = pytest.mark.long

SHARD = 2  # of the job in conftest.py


def writes(undisturbed, *kinds: str) -> list[int]:
    """Numbers of the writes to these files or folders in an undisturbed run."""
    paths = undisturbed[1]
    return [n for n, path in enumerate(paths, 1) if path.partition("/")[0] in kinds]


@pytest.mark.parametrize("kind", ["lost_answer", "refused"])
def test_error_of_any_one_write_costs_a_retry_and_nothing_else(
    server, run, undisturbed, expected, tmp_path, kind
):
    for number in range(1, len(undisturbed[1]) + 1):
        output = tmp_path / str(number)
        assert run(output, at=number, kind=kind) == 0, server.said
        check_complete(output, expected, redone=0)


def test_claim_that_was_not_written_ends_the_run_before_any_work(server, run, expected, tmp_path):
    output = tmp_path / "out"
    assert run(output, at=1, kind="lie") == 5
    assert not list(output.glob("images/*"))
    assert run(output) == 0, server.said
    check_complete(output, expected, redone=0)


def test_plan_that_was_not_written_ends_the_run_before_any_work(
    server, run, undisturbed, expected, tmp_path
):
    output = tmp_path / "out"
    (number,) = writes(undisturbed, "job.json")
    assert run(output, at=number, kind="lie") == 5
    assert "job.json" in server.said
    assert not list(output.glob("images/*"))
    assert run(output) == 0, server.said
    check_complete(output, expected, redone=0)


def test_commit_that_was_not_written_is_missed_at_the_end_and_made_again(
    server, run, undisturbed, expected, tmp_path
):
    for number in writes(undisturbed, "manifest"):
        output = tmp_path / str(number)
        assert run(output, at=number, kind="lie") == 5
        assert "confirmed" in server.said
        report = check_visible(output, expected)
        assert report["left"] > 0
        assert run(output) == 0, server.said
        check_complete(output, expected, redone=SHARD)


@pytest.mark.parametrize("kind", ["lie", "torn_lie"])
def test_image_that_was_not_written_is_found_by_verify(server, run, undisturbed, tmp_path, kind):
    for number in writes(undisturbed, "images"):
        output = tmp_path / str(number)
        assert run(output, at=number, kind=kind) == 0, server.said
        assert server.run("verify", output) == 1
        assert ("the file is missing" if kind == "lie" else "bytes, committed") in server.said
        assert "1 changed or lost" in server.said


@pytest.mark.parametrize("kind", ["lie", "torn_lie", "torn_die"])
def test_summary_that_was_not_written_is_mended_by_the_next_run(
    server, run, undisturbed, expected, tmp_path, kind
):
    output = tmp_path / "out"
    (number,) = writes(undisturbed, "metadata.parquet")
    assert run(output, at=number, kind=kind) == (-signal.SIGKILL if kind == "torn_die" else 0)
    assert run(output) == 0, server.said
    check_complete(output, expected, redone=0)


def test_torn_image_of_a_dead_process_is_litter(server, run, undisturbed, expected, tmp_path):
    for number in writes(undisturbed, "images"):
        output = tmp_path / str(number)
        assert run(output, at=number, kind="torn_die") == -signal.SIGKILL
        check_visible(output, expected)
        assert run(output) == 0, server.said
        check_complete(output, expected, redone=SHARD)


def test_torn_commit_is_an_error_that_says_which_file_to_delete(
    server, run, undisturbed, expected, tmp_path
):
    for number in writes(undisturbed, "manifest"):
        output = tmp_path / str(number)
        assert run(output, at=number, kind="torn_die") == -signal.SIGKILL
        assert run(output) == 5
        _delete_named(server.said, output / "manifest")
        assert run(output) == 0, server.said
        check_complete(output, expected, redone=SHARD)


def test_torn_claim_is_an_error_that_says_which_file_to_delete(server, run, expected, tmp_path):
    output = tmp_path / "out"
    assert run(output, at=1, kind="torn_die") == -signal.SIGKILL
    assert run(output) == 5
    _delete_named(server.said, output / "events")
    assert run(output) == 0, server.said
    check_complete(output, expected, redone=0)


def _delete_named(message: str, folder: Path) -> None:
    (named,) = [p for p in folder.iterdir() if str(p) in message]
    assert "delete" in message
    named.unlink()
