"""Changing a module of the project in processes that a test does not start itself.

For a `sitecustomize`, which Python imports at its start: waiting for the module means that the many
processes of Ray which never import it pay nothing.
"""

import importlib.abc
import importlib.util
import sys


class _Finder(importlib.abc.MetaPathFinder):
    """Lets one module be found as always, and calls `install` with it once it has run."""

    def __init__(self, name, install):  # type: ignore[no-untyped-def]
        self._name = name
        self._install = install

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            run(module)
            self._install(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(name, install):  # type: ignore[no-untyped-def]
    """Call `install` with a module once it has been imported."""
    sys.meta_path.insert(0, _Finder(name, install))
