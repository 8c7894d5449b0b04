"""The Serve configuration in cluster/, deployed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

DEPLOY = """
import json, sys, time
import httpx
from see_ray import cluster
cluster.connect()
from ray import serve
from ray.serve.schema import ServeDeploySchema
config = json.load(sys.stdin)
http = config["http_options"]
serve.start(http_options=http)
serve.context._get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
url = f"http://{http['host']}:{http['port']}"
until = time.monotonic() + 180
def ready():
    apps = serve.status().applications
    return len(apps) == 2 and all(app.status == "RUNNING" for app in apps.values())
while not ready() and time.monotonic() < until:
    time.sleep(0.5)
while httpx.get(f"{url}/health", timeout=30).status_code != 200 and time.monotonic() < until:
    time.sleep(0.5)
body = {"model": "see", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8}
ask = lambda key: httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": key}, timeout=60)
answers = [ask("Bearer wrong"), ask("Bearer secret")]
print(json.dumps([[answer.status_code, answer.json()] for answer in answers]))
serve.shutdown()
"""


@pytest.mark.slow
def test_serve_deploys_the_config_and_it_answers(tmp_path: Path) -> None:
    """In a Ray of its own, with the embedded base model, a folder as the store, and no GPU; all else as shipped."""
    manifest = yaml.safe_load((ROOT / "cluster" / "rayservice.see.yaml").read_text(encoding="utf-8"))
    serve_config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    serve_config["http_options"] |= {"host": "127.0.0.1", "port": port}
    for app in serve_config["applications"]:
        small = {"replica_gpus": 0, "replica_cpus": 0.1, "max_replicas": 1, "ingress_replicas": 1, "spare": False}
        app["args"] = {"store": {"url": str(tmp_path)}, "serve": {**app["args"]["serve"], **small}}
    done = subprocess.run(
        [sys.executable, "-c", DEPLOY],
        input=json.dumps(serve_config),
        env={**os.environ, "RAY_ADDRESS": "local", "SEE_API_KEY": "secret"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer_lines = [line for line in done.stdout.splitlines() if line.startswith("[[")]  # Ray prints there, too
    refused, answered = json.loads(answer_lines[-1])
    assert refused[0] == 401
    assert answered[0] == 200
    assert answered[1]["see"]["answered_by"] == "generalist"
    assert "Paris" in answered[1]["choices"][0]["message"]["content"]
