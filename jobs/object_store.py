"""Object stores behind `Storage`: how they are opened, and what their errors mean to a user.

Everything is configured from the environment (`docs/object-stores.md` has the variables). obstore
repeats a request by itself unless it is told not to, also one that creates an object if it is
absent: where only the answer to the first try was lost, the second finds the object there and
reports it as another's. So its own retries are off, but for listings, where it alone knows the
page that failed, and `Storage` retries.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, Literal

from obstore.exceptions import (
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import from_url

SCHEMES = ("s3", "gs", "az")

Verdict = Literal["final", "unreachable", "busy"]

_FINAL = (
    FileNotFoundError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
_STATUS = re.compile(r"status code: (\d{3})")
_S3_ERROR = re.compile(r"<Code>([^<]*)</Code>.*?<Message>([^<]*)</Message>", re.DOTALL)
_CAUSE = re.compile(r'(?:message|error): "([^"]+)"')
_URL = re.compile(r"https?://[^/\s,]+")
# Where the client asks for credentials when the environment holds none.
_METADATA_SERVICES = (
    "/latest/api/token",
    "/latest/meta-data",
    "/computeMetadata/",
    "/metadata/identity",
    "169.254.170.2",
)
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_WRONG_REGION = ("BareRedirect", "PermanentRedirect", "AuthorizationHeaderMalformed")
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_SERVICE_ACCOUNT (a key file)",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


def open_store(uri: str, *, retry: bool) -> Any:
    """An obstore store for `s3://`, `gs://` or `az://`; nothing is sent yet.

    Args:
        retry: let obstore repeat requests.

    Raises:
        BaseError, ValueError: the address or a variable cannot be understood.
    """
    if not retry:
        return from_url(uri, retry_config={"max_retries": 0})
    return from_url(uri, retry_config={"max_retries": 10, "retry_timeout": timedelta(minutes=2)})


def verdict(error: Exception) -> Verdict:
    """Whether trying again can help.

    `final` cannot; `unreachable` might, but the address or the credentials may as well be wrong;
    `busy` will: the store answered that it is overloaded, or an answer was lost on its way.
    """
    text = str(error)
    if isinstance(error, _FINAL):
        return "final"
    if any(service in text for service in _METADATA_SERVICES):
        return "unreachable"
    status = _STATUS.search(text)
    if status is not None:
        code = int(status.group(1))
        # 409: another write of the same object was under way. S3 says 400 RequestTimeout where a
        # connection broke while it was reading.
        passing = code >= 500 or code in (408, 409, 429) or "<Code>RequestTimeout<" in text
        return "busy" if passing else "final"
    if "HTTP error" not in text or "builder error" in text or "BareRedirect" in text:
        return "final"
    return "unreachable" if "kind: Connect" in text else "busy"


def bucket_is_missing(error: Exception) -> bool:
    """Whether "not found" means the bucket, and not an object of it."""
    return any(words in str(error) for words in _NO_BUCKET)


def explain(uri: str, error: Exception) -> str:
    """One line: what went wrong, and what to change where that is known."""
    scheme, _, rest = uri.partition("://")
    bucket = rest.split("/")[0]
    text = str(error)
    brief = _brief(text)
    if any(service in text for service in _METADATA_SERVICES) or "credential error" in text:
        return (
            f"no credentials were found ({brief}); set {_CREDENTIALS[scheme]} in the environment "
            "of every node, or run where the machine has a role"
        )
    if bucket_is_missing(error):
        return f"there is no bucket {bucket!r} at {_host(text)}; make it, or change output.uri"
    if any(words in text for words in _WRONG_REGION):
        return f"bucket {bucket!r} is in another region ({brief}); set AWS_REGION to it"
    if "BadScheme" in text:
        return "the endpoint is http://, which is refused; set AWS_ALLOW_HTTP=true to allow it"
    if "Account must be specified" in text:
        return "no storage account is named; set AZURE_STORAGE_ACCOUNT_NAME"
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        return (
            f"refused ({brief}); the credentials in the environment must allow to list, read, "
            f"write and delete in bucket {bucket!r}"
        )
    if "kind: Connect" in text:
        return f"{_host(text)} cannot be reached: {brief}"
    return brief


def _host(text: str) -> str:
    found = _URL.search(text)
    return found.group(0) if found else "its address"


def _brief(text: str) -> str:
    """An obstore message in one line, without URL, timing and debug dump."""
    head, _, debug = text.partition("\n\nDebug source")
    status = _STATUS.search(head)
    said = _S3_ERROR.search(head)
    if status is not None and said is not None:
        return f"{status.group(1)} {said.group(1)}: {' '.join(said.group(2).split())}"
    if status is not None:
        return " ".join(head[status.start(1) :].split())
    cause = _CAUSE.findall(debug)
    if "HTTP error" in head:
        if cause:
            return str(cause[-1])
        return "the connection broke" if "Incomplete" in debug else _last(head)
    return _last(head)


def _last(head: str) -> str:
    words = " ".join(head.split())
    return words.rsplit(" - ", 1)[-1].removeprefix("Generic S3 error: ")
