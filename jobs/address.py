"""The address of a Ray cluster: which one is meant, and whether anything answers there.

Needs no Ray, so that it can say what is wrong where Ray is not installed.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from jobs.errors import InputError

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # as `ray job` reads them
CONNECT_SECONDS = 5.0
_PORTS = {"http": 80, "https": 443, "ray": 10001, "": 6379}


def environment_address() -> str | None:
    """Return the cluster that the environment names, None where it names none."""
    for name in ADDRESS_VARIABLES:
        if os.environ.get(name):
            return os.environ[name]
    return None


def cluster_address(address: str | None) -> str:
    """Return the address to submit to: the one given, else the environment's.

    Raises `InputError`, which says how to give one, where there is none.
    """
    found = address or environment_address()
    if found is None:
        raise InputError(
            "no cluster to submit to: give --address http://HEAD:8265 or set RAY_ADDRESS "
            "(`ray start --head` starts a cluster of this machine at http://127.0.0.1:8265)"
        )
    return found.rstrip("/")


def unreachable_reason(address: str) -> str | None:
    """Return why nothing listens at an address; None where something does, or for `auto`."""
    if address == "auto":
        return None
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        if not parts.hostname:
            return "no host is named"
        port = parts.port or _PORTS.get(parts.scheme, 80)
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def current_cluster() -> str | None:
    """Return the address that Ray's `auto` stands for: of the newest head of this machine."""
    folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray"
    with contextlib.suppress(OSError):
        return (folder / "ray_current_cluster").read_text(encoding="ascii").strip() or None
    return None


def listens_on_loopback_only(address: str) -> bool:
    """Whether an address is of this machine and nothing answers there from outside.

    Ray replaces a loopback address by the machine's outward one, where such a head would never
    be found.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    host = parts.hostname or ""
    if parts.scheme or not (host == "localhost" or host == "::1" or host.startswith("127.")):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only a route is looked up
        except OSError:
            return True  # there is no way out of this machine
        outward = probe.getsockname()[0]
    return unreachable_reason(f"{outward}:{parts.port or _PORTS['']}") is not None
