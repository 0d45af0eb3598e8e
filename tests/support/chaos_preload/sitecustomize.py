"""Python imports this at its start where the folder is on the path: the faults of `storage_faults`.

It needs `tests/support` on the path too.
"""

import os


def _install(storage) -> None:  # type: ignore[no-untyped-def]
    import storage_faults

    storage_faults.install({"rates": os.environ["CHAOS_RATES"]})


if os.environ.get("CHAOS_RATES"):
    from import_hook import after_import

    after_import("jobs.storage", _install)
