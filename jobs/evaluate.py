"""`see eval` as a job: `ray job submit --working-dir . -- python jobs/evaluate.py SOURCE… --store URL`."""

from __future__ import annotations

import sys

from see_ray.cli.main import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
