"""Every command line of README and docs is typed, in the order of its page, and ends well."""

import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import hub_server
import pytest
from document_pages import PAGES, ROOT, name_of, shell_blocks, shell_lines, text_of
from loopback import free_port
from reader import TINY, Reader
from s3_server import s3_environment, s3_server
from ssh_server import MISSING, has_ssh, ssh_server

PAGES_WITH_LINES = {name_of(page): page for page in PAGES if shell_lines(page)}
SSH = re.compile(r"^(ssh|ray submit) ")
# Those that run the tests, this one among them.
BY_CI = {"make test", "make test-long", "make check", "make chaos", "make test-browser"}
NOT_TYPED = BY_CI | {"make test-slow"}
# Those that take the ports that their pages name.
PORTS = (6379, 8265, 8420, 8421)


@pytest.fixture(scope="module")
def hub() -> Iterator[hub_server.HubServer]:
    """Where weights are fetched from and datasets are uploaded to."""
    server = hub_server.serve(ROOT / TINY)
    yield server
    server.close()


@pytest.fixture
def reader(tmp_path: Path, hub: hub_server.HubServer) -> Iterator[Reader]:
    """A new one, on a machine where nothing else listens."""
    for port in PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    with s3_server("my-bucket") as s3:
        found = Reader.arrive(tmp_path, s3_environment(s3.port) | hub.environment)
        yield found
        found.leave()


def login(reader: Reader) -> Mapping[str, str]:
    """Variables that a shell of the reader's has on any machine, this one too."""
    names = (
        "HOME",
        "PATH",
        "PYTHONPATH",
        "ZIMAGE_READER",
        "HF_ENDPOINT",
        "RAY_USAGE_STATS_ENABLED",
    )
    return {name: reader.environment[name] for name in names}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", PAGES_WITH_LINES)
def test_the_lines_of_a_page_can_be_typed(name: str, reader: Reader) -> None:
    blocks = [
        [line for line in lines if line.partition(" #")[0].strip() not in NOT_TYPED]
        for lines in shell_blocks(PAGES_WITH_LINES[name])
    ]
    left_out = []
    if not has_ssh():
        left_out = [line for lines in blocks for line in lines if SSH.match(line)]
        blocks = [[line for line in lines if line not in left_out] for lines in blocks]
    with ExitStack() as stack:
        if has_ssh() and any(SSH.match(line) for lines in blocks for line in lines):
            stack.enter_context(ssh_server(reader.home, free_port(), login(reader)))
        problems = reader.read(blocks) + reader.leave()
    assert not problems, "\n\n".join(problems)
    if left_out:
        pytest.skip(f"all but these, which want SSH ({MISSING}): {left_out}")


def test_lines_that_are_not_typed_run_tests() -> None:
    by_ci = text_of(ROOT / ".ci/run").splitlines()
    assert set(by_ci) >= BY_CI
    lines = {line for page in PAGES_WITH_LINES.values() for line in shell_lines(page)}
    assert lines >= NOT_TYPED


@pytest.mark.slow
def test_the_upload_holds_what_was_exported(reader: Reader, hub: hub_server.HubServer) -> None:
    hub.uploads.clear()
    assert reader.read(shell_blocks(ROOT / "docs/take-over.md")) == []
    exported = reader.folder / "avatars-dataset"
    files = {
        f"reader/avatars/{path.relative_to(exported).as_posix()}": path.read_bytes()
        for path in exported.rglob("*")
        if path.is_file()
    }
    assert files == hub.uploads
    assert sum(name.endswith(".png") for name in files) == 6
