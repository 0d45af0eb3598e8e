"""A process that dies before, in and after every write of a job, and the run that follows."""

import signal

import pytest
from job_runs import read_hashes
from output_checks import check_complete, check_visible

pytestmark = pytest.mark.long

KINDS = ["die_before", "die_half", "die_after"]
SHARD = 2  # of the job in conftest.py


def test_every_file_of_an_output_is_written_where_these_tests_step_in(undisturbed):
    output, paths = undisturbed
    files = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()}
    assert {f for f in files if not f.startswith("logs/")} == set(paths)
    kinds = [path.partition("/")[0] for path in paths]
    assert kinds[:2] == ["events", "job.json"]  # the claim first, then the plan
    assert kinds[-2:] == ["metadata.parquet", "events"]
    last = {kind: number for number, kind in enumerate(kinds)}
    assert last["images"] < last["manifest"]


@pytest.mark.parametrize(
    "kind",
    [k if k == "die_half" else pytest.param(k, marks=pytest.mark.chaos) for k in KINDS],
)
def test_death_around_any_write_loses_and_doubles_nothing(
    server, run, undisturbed, expected, tmp_path, kind
):
    for number in range(1, len(undisturbed[1]) + 1):
        output = tmp_path / str(number)
        assert run(output, at=number, kind=kind) == -signal.SIGKILL
        check_visible(output, expected)
        assert run(output) == 0, server.said
        check_complete(output, expected, redone=SHARD)
    assert server.run("verify", output) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_second_death_around_any_write_of_the_run_that_follows(
    server, run, undisturbed, expected, tmp_path, kind
):
    writes = len(undisturbed[1])
    for first in range(1, writes + 1):
        for second in range(1, writes + 1):
            output = tmp_path / f"{first}-{second}"
            assert run(output, at=first, kind=kind) == -signal.SIGKILL
            code = run(output, at=second, kind=kind)
            check_visible(output, expected)
            if code == 0:  # the second run had fewer writes left to make
                break
            assert code == -signal.SIGKILL, server.said
            assert run(output) == 0, server.said
            check_complete(output, expected, redone=2 * SHARD)


@pytest.mark.parametrize("kind", ["die_after", pytest.param("die_half", marks=pytest.mark.slow)])
def test_job_gets_done_by_runs_that_all_die_each_a_write_later(server, run, tmp_path, kind):
    count, whole, output = 9, tmp_path / "whole", tmp_path / "out"
    assert run(whole, "--count", count) == 0
    expected = read_hashes(whole)
    deaths = 0
    for number in range(1, 60):
        code = run(output, "--count", count, at=number, kind=kind)
        check_visible(output, expected)
        if code == 0:
            break
        assert code == -signal.SIGKILL, server.said
        deaths += 1
    assert deaths >= 6  # what a run commits before it dies is kept: otherwise none would end
    check_complete(output, expected, redone=deaths * SHARD)
