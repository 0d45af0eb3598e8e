"""The script for `ray submit CLUSTER.yaml jobs/ray_submit.py [-- JOB ARGUMENTS...]`.

Ray copies this one file to the head node and runs it there by its path. Without arguments it runs
the job that the cluster file carries under `metadata.job`, from the copy of that file which
`ray up` and `ray submit --start` leave in the home folder; with arguments, `zimage run` with them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

BOOTSTRAP = "~/ray_bootstrap_config.yaml"


def main(arguments: Sequence[str]) -> int:
    """Run a job on the cluster of this head node; returns the exit code of `zimage run`."""
    from jobs.cli import main as zimage

    # Without an address the job would start a Ray of its own beside the cluster's.
    os.environ.setdefault("RAY_ADDRESS", "auto")
    job = list(arguments)
    if not job or job[0].startswith("-"):
        job.insert(0, str(Path(BOOTSTRAP).expanduser()))
    return zimage(["run", *job])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
