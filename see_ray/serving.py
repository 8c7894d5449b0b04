"""Bringing the endpoint up and taking it down.

`start` starts everything on a Ray cluster: generalist, ingress and deployer, which then starts the
experts. `build` gives the ingress application alone, for a Serve config file
(`import_path: see_ray.serving:build`).
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException

from see_ray import api
from see_ray.base_model import find
from see_ray.config import Config
from see_ray.deployer import Deployer
from see_ray.errors import ServingError
from see_ray.ingress import Ingress, web
from see_ray.replica import GENERALIST_APP, INGRESS_APP, replica_app


def ingress_app(config: Config, keys: api.ApiKeys) -> serve.Application:
    """The ingress with its deployer."""
    settings = config.model_dump(mode="json")
    deployer = serve.deployment(Deployer, name="Deployer").options(num_replicas=1, ray_actor_options={"num_cpus": 0})
    ingress = serve.deployment(serve.ingress(web)(Ingress), name="Ingress").options(
        ray_actor_options={"num_cpus": config.serve.replica_cpus},
        max_ongoing_requests=10 * config.serve.max_ongoing_requests,
    )
    return ingress.bind(settings, keys, deployer.bind(settings))


def build(args: dict[str, Any]) -> serve.Application:
    """The ingress application from a Serve config file; `args` are the sections of the configuration."""
    config = Config.model_validate(args)
    return ingress_app(config, check_exposure(config))


def check_exposure(config: Config) -> api.ApiKeys:
    """The API keys to ask for.

    Raises:
        ServingError: the address is open to others, and neither a key nor `no_auth` is set.
        ConfigError: the key file cannot be read or holds no key.
    """
    keys = api.ApiKeys.from_env_and_file(os.environ, config.serve.api_key_file)
    if not keys.required and not config.serve.no_auth and not _is_loopback(config.serve.host):
        raise ServingError(
            f"serve.host {config.serve.host} can be reached from other machines, and there is no API key; "
            "set SEE_API_KEY or serve.api_key_file, or say --no-auth"
        )
    return keys


def start(config: Config) -> str:
    """Start the endpoint on the Ray that this process is connected to; returns its URL once every
    expert of the store's head is live.

    Raises:
        BaseModelError: the base model cannot be found or read.
        ServingError: no key for a public address, the port is taken, or something did not start.
    """
    keys = check_exposure(config)
    if INGRESS_APP in serve.status().applications:
        raise ServingError("this Ray cluster serves an endpoint already; stop it first, or use another cluster")
    host, port = config.serve.host, config.serve.port
    _check_port(host, port)
    find(config.base_model)  # convert or fetch it once, before replicas ask for it all at once
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": config.serve.request_timeout_s})
    try:
        serve.run_many(
            [
                serve.RunTarget(replica_app(config, None), name=GENERALIST_APP, route_prefix=None),
                serve.RunTarget(ingress_app(config, keys), name=INGRESS_APP, route_prefix="/"),
            ]
        )
    except (RuntimeError, RayServeException) as error:
        raise ServingError(f"the endpoint did not start: {_last_error(error)}") from error
    deployer = serve.get_deployment_handle("Deployer", INGRESS_APP)
    while deployer.live.remote().result().version < 0:
        time.sleep(0.2)
    return f"http://{'[' + host + ']' if ':' in host else host}:{port}"


def stop() -> None:
    """Take the endpoint down: the ingress first, so that nothing new comes in. Other Serve
    applications of the cluster are left alone."""
    running = set(serve.status().applications)
    ours = {name for name in running if name == INGRESS_APP or name.startswith("see-")}
    if running == ours:
        return serve.shutdown()
    for name in sorted(ours, key=lambda name: name != INGRESS_APP):
        serve.delete(name)


def about_replicas() -> dict[str, dict[str, Any]]:
    """What a replica of each says of itself (its process id, for example): the generalist, and all live experts."""
    live = serve.get_deployment_handle("Deployer", INGRESS_APP).live.remote().result()
    apps = {"generalist": GENERALIST_APP, **{expert.name: expert.app for expert in live.experts}}
    return {name: serve.get_app_handle(app).about.remote().result() for name, app in apps.items()}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ServingError(f"cannot bind {host}:{port}: {error.strerror}; choose another serve.port") from error


def _last_error(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "Error" in line]
    return (lines or str(error).splitlines() or [type(error).__name__])[-1][:400]
