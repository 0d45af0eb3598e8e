"""Build hook: where `configs/`, `data/` and the job files go inside a wheel.

Both folders have generic names, so in a wheel they lie below the `jobs` package, in the same
places relative to each other as in a clone (`jobs.resources.bundle_root` finds either). A plain
`force-include` table in pyproject.toml would also copy them into every editable install, where
the stray `site-packages/jobs` folder then hides the real package.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# What a package other than `jobs` reads as well, at a place of its own.
COPIES = {"data/vocabularies": "prompt_generators/vocabularies"}
JOBS = [f"jobs/{name}.yaml" for name in ("avatars", "edit", "food", "gaming")]
BUNDLED = ["configs", "data", *JOBS]


class WheelLayoutHook(BuildHookInterface):
    """Adds the bundled files to standard wheels and to nothing else."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Extend hatchling's `force_include` map in place."""
        if self.target_name == "wheel" and version == "standard":
            for path in BUNDLED:
                build_data["force_include"][path] = f"jobs/bundled/{path}"
            build_data["force_include"].update(COPIES)
