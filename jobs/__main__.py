"""`python -m jobs` is `zimage`."""

from jobs.cli import main

raise SystemExit(main())
