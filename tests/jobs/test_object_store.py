"""Object stores: a real S3 server on loopback, behind a proxy that breaks its traffic."""

import json
import os
import time
from collections.abc import Iterator

import pytest
from fault_proxy import Fault, FaultProxy, seeded
from s3_server import BUCKET

from jobs import storage as storage_module
from jobs.errors import InputError, StorageError, StorageUnusableError
from jobs.storage import Storage

CLOUD_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_")


@pytest.fixture
def storage(uri) -> Storage:
    return Storage(uri)


PASSING = [f for f in Fault if f is not Fault.LIE]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(storage, proxy, fault):
    for _ in range(3):
        proxy.once("PUT", "/a/file", fault)
        storage.put("a/file", b"content")
        proxy.once("GET", "/a/file", fault)
        assert storage.get("a/file") == b"content"
        proxy.once("GET", "/a/file", fault)
        assert storage.get_range("a/file", 3, 2) == b"te"
        proxy.once("HEAD", "/a/file", Fault.DROP_AFTER if fault is Fault.CUT else fault)
        assert storage.exists("a/file")
        proxy.once("GET", f"/{BUCKET}$", fault)
        assert list(storage.names("a")) == ["file"]
    assert proxy.faults.total() == 15


@pytest.mark.parametrize("fault", PASSING)
def test_create_knows_its_own_object_from_anothers(storage, proxy, fault):
    proxy.once("PUT", "claim", fault)
    assert storage.create("claim", b"mine: 1f3a")
    proxy.once("PUT", "claim", fault)
    assert not storage.create("claim", b"theirs: 77b0")
    assert storage.get("claim") == b"mine: 1f3a"


def test_lost_answers_in_a_row_and_another_that_comes_first(storage, proxy):
    proxy.once("PUT", "one", Fault.DROP_AFTER)
    proxy.once("PUT", "one", Fault.FAIL_AFTER)
    proxy.once("PUT", "one", Fault.DROP_BEFORE)
    assert storage.create("one", b"a")
    # the first try never arrives, and before the second somebody else takes the name
    proxy.once("PUT", "two", Fault.DROP_BEFORE)
    proxy.once("PUT", "two", before=lambda: storage.put("two", b"b"))
    assert not storage.create("two", b"a")


def test_conflict_with_a_write_that_comes_to_nothing_is_no_loss(storage, proxy):
    """S3 answers 409 while another conditional write is under way, which obstore takes for
    "exists already"; that other write may fail."""
    conflict = b"<Error><Code>ConditionalRequestConflict</Code><Message>m</Message></Error>"
    proxy.once("PUT", "claim", answer=(409, conflict))
    assert storage.create("claim", b"mine")
    proxy.once("PUT", "claim", answer=(409, conflict))
    assert not storage.create("claim", b"theirs")


def test_read_of_what_is_not_there(storage):
    assert storage.get("nothing") is None
    assert storage.get_range("nothing", 0, 5) is None
    assert not storage.exists("nothing")
    assert list(storage.names("nothing")) == []


@pytest.mark.parametrize("where", ["s3", "local"])
def test_ranges(storage, proxy, tmp_path, where):
    if where == "local":
        storage = Storage(str(tmp_path / "out"), create=True)
    storage.put("file", b"0123456789")
    assert storage.get_range("file", 2, 3) == b"234"
    assert storage.get_range("file", 8, 5) == b"89"
    assert storage.get_range("file", 20, 5) == b""
    proxy.once("GET", "/file$", answer=(503, b"request 416416 of port 41600, slow down"))
    assert storage.get_range("file", 2, 3) == b"234", "its digits are no status"


def test_large_file_goes_in_parts_and_arrives_whole(storage, proxy, tmp_path):
    file = tmp_path / "large"
    content = bytes(range(256)) * (144 * 1024)  # 36 MiB
    file.write_bytes(content)
    proxy.once("PUT", "large", Fault.DROP_BEFORE)
    storage.put("large", file)
    assert len({r.query for r in proxy.requests("PUT", "large") if "partNumber" in r.query}) >= 3
    assert storage.get_range("large", 16 * 2**20 - 4, 8) == content[252:256] + content[:4]
    assert len(storage.get("large") or b"") == len(content)


@pytest.mark.long
def test_listing_goes_on_where_it_broke(storage, proxy):
    names = {f"{n:04d}" for n in range(2500)}
    for name in names:
        storage.put(f"many/{name}", b"")
    proxy.log.clear()
    proxy.once("GET", f"/{BUCKET}$")
    proxy.once("GET", f"/{BUCKET}$", Fault.CUT)
    proxy.once("GET", f"/{BUCKET}$", Fault.UNAVAILABLE)
    assert sorted(storage.names("many")) == sorted(names)
    assert len(proxy.requests("GET", f"/{BUCKET}$")) == 5  # three pages, two of them again


def test_under_steady_faults_everything_arrives(storage, proxy):
    rates = {fault: 0.05 for fault in PASSING if fault is not Fault.DELAY}
    proxy.schedule = seeded(3, rates)
    for n in range(60):
        assert storage.create(f"parts/{n:03d}", f"nonce {n}".encode())
    assert sorted(storage.names("parts")) == [f"{n:03d}" for n in range(60)]
    assert all(storage.get(f"parts/{n:03d}") == f"nonce {n}".encode() for n in range(60))
    assert proxy.faults.total() > 20


def test_time_is_bounded(storage, proxy, monkeypatch):
    monkeypatch.setattr(storage_module, "_BUSY_SECONDS", 0.5)
    storage.put("a", b"")
    proxy.schedule = lambda _: Fault.UNAVAILABLE
    started = time.monotonic()
    with pytest.raises(
        StorageError, match=r"cannot write: 503 SlowDown: .* \(\d+ tries in"
    ) as error:
        storage.put("a", b"")
    assert not isinstance(error.value, StorageUnusableError)
    assert time.monotonic() - started < 2
    assert len(proxy.requests("PUT")) > 3


def test_what_is_final_is_tried_once(storage, proxy):
    for status, code in ((403, "AccessDenied"), (400, "InvalidRequest"), (301, "Moved")):
        proxy.once("PUT", "file", answer=(status, f"<Error><Code>{code}</Code></Error>".encode()))
        before = len(proxy.requests("PUT"))
        with pytest.raises(StorageUnusableError):
            storage.put("file", b"")
        assert len(proxy.requests("PUT")) == before + 1


ANSWERS = {
    "no rights": (403, "AccessDenied", ["refused (403 AccessDenied: said)", "list, read, write"]),
    "unknown key": (403, "InvalidAccessKeyId", ["403 InvalidAccessKeyId", BUCKET]),
    "clock": (403, "RequestTimeTooSkewed", ["403 RequestTimeTooSkewed: said"]),
    "expired": (400, "ExpiredToken", ["400 ExpiredToken: said"]),
    "region by redirect": (301, "PermanentRedirect", ["another region", "set AWS_REGION"]),
    "region by refusal": (400, "AuthorizationHeaderMalformed", ["another region", "said"]),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_refusals_are_one_line_that_says_what_to_change(storage, proxy, name):
    status, code, words = ANSWERS[name]
    body = f"<Error><Code>{code}</Code><Message>said</Message></Error>"
    proxy.once("GET", "job.json", answer=(status, body.encode()))
    with pytest.raises(StorageUnusableError) as error:
        storage.get("job.json")
    message = str(error.value)
    assert message.startswith(f"{storage.uri}/job.json: cannot read: ")
    assert "\n" not in message and "Debug" not in message
    for word in words:
        assert word in message
    assert error.value.exit_code == 5


@pytest.mark.parametrize("operation", ["get", "put", "create", "list"])
def test_missing_bucket(proxy, operation):
    storage = Storage("s3://no-such-bucket/out")
    started = time.monotonic()
    with pytest.raises(StorageUnusableError, match="there is no bucket 'no-such-bucket' at http"):
        match operation:
            case "get":
                storage.get("job.json")
            case "put":
                storage.put("a", b"")
            case "create":
                storage.create("a", b"")
            case "list":
                list(storage.names("manifest"))
    assert time.monotonic() - started < 5


def test_unreachable_endpoint_is_given_up_soon(proxy, monkeypatch):
    monkeypatch.setattr(storage_module, "_UNREACHABLE_SECONDS", 0.3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot be reached: Connection refused"):
        Storage(f"s3://{BUCKET}/out").get("job.json")


def test_plain_http_must_be_allowed(proxy, monkeypatch):
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StorageUnusableError, match="AWS_ALLOW_HTTP=true"):
        Storage(f"s3://{BUCKET}/out").get("job.json")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://bucket/out", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("gs://bucket/out", "GOOGLE_SERVICE_ACCOUNT"),
        ("az://container/out", "AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_no_credentials(server, monkeypatch, uri, words):
    """Without any the client asks the machine's metadata service, here one that is not there."""
    for name in list(os.environ):
        if name.startswith(CLOUD_VARIABLES):
            monkeypatch.delenv(name)
    monkeypatch.setattr(storage_module, "_UNREACHABLE_SECONDS", 0.3)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=words):
        Storage(uri).get("job.json")


@pytest.fixture
def other_stores(server, monkeypatch) -> Iterator[FaultProxy]:
    """What the clients of GCS and Azure send, with scripted answers: no server of theirs runs."""
    monkeypatch.setattr(storage_module, "_FIRST_DELAY", 0.01)
    with FaultProxy(server.address) as proxy:
        key = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        key["gcs_base_url"] = f"http://127.0.0.1:{proxy.port}"
        variables = {
            "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key),
            "GOOGLE_ALLOW_HTTP": "true",
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_STORAGE_ACCOUNT_KEY": "bm90aGluZw==",
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{proxy.port}",
            "AZURE_ALLOW_HTTP": "true",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.mark.parametrize(
    ("uri", "condition", "exists"),
    [
        ("gs://bucket/out", ("x-goog-if-generation-match", "0"), 412),
        ("az://container/out", ("if-none-match", "*"), 409),
    ],
)
def test_create_is_conditional_on_gcs_and_azure_too(other_stores, uri, condition, exists):
    storage = Storage(uri)
    other_stores.once("PUT", "claim", answer=(503, b""))
    other_stores.once("PUT", "claim", answer=(exists, b""))
    other_stores.once("GET", "claim", answer=(200, b"theirs"))
    assert not storage.create("claim", b"mine")
    # the first try's answer was lost, and what is there is its own
    other_stores.once("PUT", "again", Fault.DROP_BEFORE)
    other_stores.once("PUT", "again", answer=(exists, b""))
    other_stores.once("GET", "again", answer=(200, b"mine"))
    assert storage.create("again", b"mine")
    sent = other_stores.requests("PUT", "claim")
    assert [r.headers.get(condition[0]) for r in sent] == [condition[1]] * 2
    assert sent[0].path.endswith("/out/claim")


@pytest.mark.parametrize(
    ("uri", "status", "body", "words"),
    [
        ("gs://bucket/out", 404, "The specified bucket does not exist", "no bucket 'bucket'"),
        ("gs://bucket/out", 403, "AccessDenied", "list, read, write and delete in bucket 'bucket'"),
        ("az://container/out", 404, "ContainerNotFound", "no bucket 'container'"),
        ("az://container/out", 403, "AuthenticationFailed", "AuthenticationFailed: said"),
    ],
)
def test_refusals_of_gcs_and_azure(other_stores, uri, status, body, words):
    answer = f"<Error><Code>{body}</Code><Message>said</Message></Error>"
    other_stores.once("GET", "job.json", answer=(status, answer.encode()))
    with pytest.raises(StorageUnusableError, match=words):
        Storage(uri).get("job.json")


def test_a_key_file_that_is_missing(monkeypatch):
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", "/no/such.json")
    with pytest.raises(StorageError, match=r"/no/such\.json"):
        Storage("gs://bucket/out")


def test_unknown_scheme():
    with pytest.raises(InputError, match="unknown scheme 'ftp'"):
        Storage("ftp://host/out")
