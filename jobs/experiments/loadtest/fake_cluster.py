"""A Ray cluster on this machine whose nodes come and go: the real autoscaler, with processes as nodes.

Ray's fake node provider starts a raylet where a cloud would start a machine; everything else, from demand to idle
timeout, is as on a cloud. Ray's own `AutoscalingCluster` does the same, but begins and ends with `ray stop`, which
ends every Ray on the machine; this class touches its own processes only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from see_ray import cluster
from see_ray.errors import ServingError

START_S = 60.0
"""Seconds that the head may take to start."""

HEAD = "ray.head.default"
"""The fake provider's name of the head's node type."""

ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray takes another address than loopback
}

_EMPTY_LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "rsync_filter",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude",
)  # fmt: skip


class FakeCluster:
    """A head node, and worker nodes that the autoscaler starts and stops; a context manager.

    Inside the block SIGTERM acts as Ctrl-C, so that a terminated process takes its cluster with it: a Ray that is left
    behind would be found by the next process that looks for one on this machine.

    Args:
        node: resources of a worker node, such as `{"CPU": 1}`.
        max_nodes: most worker nodes.
        idle_s: seconds after which an idle one is stopped.
        head_cpus: CPUs of the head node.

    Raises:
        ServingError: the head did not start.
    """

    def __init__(self, node: dict[str, float], max_nodes: int, *, idle_s: float = 10, head_cpus: float = 0):
        self._node, self._max_nodes, self._idle_s, self._head_cpus = node, max_nodes, idle_s, head_cpus
        self.address = ""

    def __enter__(self) -> Self:
        cluster.set_environment()
        from ray._private import ray_constants

        self._folder = Path(tempfile.mkdtemp(prefix="see", dir="/tmp"))  # paths of sockets must be short
        self._log = self._folder / "log"
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.address = f"127.0.0.1:{server.getsockname()[1]}"
        (self._folder / "autoscaler.json").write_text(json.dumps(self._autoscaler_config()), encoding="utf-8")
        self._previous_handler = None
        if threading.current_thread() is threading.main_thread():  # only this one may set it
            self._previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        ray_constants.ENABLE_RAY_CLUSTER = False  # as ENVIRONMENT says, which this process has read already
        with self._log.open("wb") as log:
            self._head = subprocess.Popen(self._head_command(), stdout=log, stderr=log, env=os.environ | ENVIRONMENT)
        self._wait_for_head()
        return self

    def _wait_for_head(self) -> None:
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in self._log.read_text(errors="replace"):
            if self._head.poll() is not None or time.monotonic() > deadline:
                output = self._log.read_text(errors="replace")[-500:]
                self._stop()
                raise ServingError(f"Ray's head did not start within {START_S:.0f} s: {output}")
            time.sleep(0.2)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        """Kill the cluster's processes, and no others."""
        import psutil

        running = self._head.poll() is None
        processes = psutil.Process(self._head.pid).children(recursive=True) if running else []
        for process in psutil.process_iter(["cmdline"]):  # orphans have this cluster's folder on their command line
            if str(self._folder) in " ".join(process.info["cmdline"] or []) and process not in processes:
                processes.append(process)
                processes.extend(process.children(recursive=True))
        if running:
            self._head.kill()
        for process in processes:
            if process.is_running():
                process.kill()
        self._head.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _head_command(self) -> list[str]:
        return [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--head",
            "--block",
            "--include-dashboard=false",
            "--node-ip-address=127.0.0.1",
            f"--port={self.address.partition(':')[2]}",
            f"--num-cpus={self._head_cpus:g}",
            f"--temp-dir={self._folder / 'ray'}",
            f"--autoscaling-config={self._folder / 'autoscaler.json'}",
            "--object-store-memory=200000000",
        ]

    def _autoscaler_config(self) -> dict[str, Any]:
        node_types = {
            HEAD: {"resources": {"CPU": self._head_cpus}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {**self._node, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": self._max_nodes,
            },
        }
        return {
            "cluster_name": "see",
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": self.address,
                "launch_multiple": True,
                "use_node_id_as_ip": True,  # all nodes have the same address
            },
            "available_node_types": node_types,
            "head_node_type": HEAD,
            "max_workers": self._max_nodes,
            "upscaling_speed": 100.0,
            "idle_timeout_minutes": self._idle_s / 60,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            **{name: [] for name in _EMPTY_LISTS},
        }
