"""`see eval` as a job, for `ray job submit -- python jobs/evaluate.py SOURCE… --store URL`; --help has its options."""

from __future__ import annotations

import sys

from see_ray.cli.main import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
