"""How many CPUs this process may use; the one rule for thread counts that are not configured."""

from __future__ import annotations


def available_cpus() -> int:
    """CPUs that this process may use, at least 1.

    The minimum of the machine's CPUs, the process's CPU affinity, the container's CPU limit (Linux cgroup v1 or v2,
    rounded up) and, where set, `$LOKY_MAX_CPU_COUNT`. `os.cpu_count()` knows only the first of these: in a container
    limited to 2 of 64 CPUs it returns 64.
    """
    from joblib import cpu_count

    return max(1, int(cpu_count()))
