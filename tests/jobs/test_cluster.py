"""What a run needs of Ray besides the executor: the signal handler, and an output that stays."""

import json
import signal

import pytest

from jobs import cluster
from jobs.errors import ClusterError, InputError


@pytest.fixture
def in_ray_job(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))


def test_relative_output_is_refused_where_ray_throws_the_folder_away(in_ray_job: None) -> None:
    with pytest.raises(InputError, match=r"output\.uri: value 'output/avatars'.*thrown away"):
        cluster.refuse_lost_output("output/avatars")
    for uri in ("/shared/avatars", "~/avatars", "s3://bucket/avatars"):
        cluster.refuse_lost_output(uri)


def test_relative_output_is_fine_anywhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    cluster.refuse_lost_output("output/avatars")
    # a Ray job without a working directory runs where it was told to
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    cluster.refuse_lost_output("output/avatars")


def test_connecting_leaves_the_handler_of_sigterm_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    def init(**arguments: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init does, with another handler

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with cluster.connected():
            assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ray_that_does_not_come_up_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**arguments: object) -> None:
        raise Exception("The current node timed out during startup.")  # as ray.init does

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = "no local Ray cluster could be started: The current node timed out during startup."
    with pytest.raises(ClusterError, match=words), cluster.connected():
        raise AssertionError("connected to nothing")
