"""Python imports this at its start where the folder is on the path: the faults of `storage_faults`.

It waits for `jobs.storage`, so that the many processes of Ray that write nothing cost nothing.
"""

import importlib.abc
import importlib.util
import os
import sys


class _Finder(importlib.abc.MetaPathFinder):
    """Lets `jobs.storage` be found as always, and installs the faults once it has run."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "jobs.storage":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            run(module)
            import storage_faults

            storage_faults.install({"rates": os.environ["CHAOS_RATES"]})

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("CHAOS_RATES"):
    sys.meta_path.insert(0, _Finder())
