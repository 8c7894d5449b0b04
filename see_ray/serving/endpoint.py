"""Starting and stopping the endpoint.

`start` starts all of it on a Ray cluster: the ingress, and in the `per_expert` topology the generalist and the
deployer, which then starts the experts; in the `shared` topology the ensemble. `build` returns the ingress application
alone, for a Serve config file (`import_path: see_ray.serving.endpoint:build`).
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import TracingConfig

from see_ray.config import Config
from see_ray.errors import ServingError
from see_ray.models.base_model import find
from see_ray.observability.tracing import EXPORTER
from see_ray.serving.api_keys import ApiKeys
from see_ray.serving.app_names import ENSEMBLE_APP, GENERALIST_APP, INGRESS_APP
from see_ray.serving.deployer import Deployer
from see_ray.serving.ensemble import ensemble_app
from see_ray.serving.ingress import Ingress, web
from see_ray.serving.live import Live
from see_ray.serving.replica import replica_app


def ingress_app(config: Config, keys: ApiKeys) -> serve.Application:
    """Serve application of the ingress, and in the `per_expert` topology of the deployer."""
    settings = config.model_dump(mode="json")
    log = {"encoding": config.serve.log_encoding}
    deployer = serve.deployment(Deployer, name="Deployer").options(
        num_replicas=1, ray_actor_options={"num_cpus": 0}, logging_config=log
    )
    ingress = serve.deployment(serve.ingress(web)(Ingress), name="Ingress").options(
        num_replicas=config.serve.ingress_replicas,
        ray_actor_options={"num_cpus": config.serve.replica_cpus},
        max_ongoing_requests=10 * config.serve.max_ongoing_requests,
        # Admission control rejects requests in the ingress; this limit is for more than it can reject.
        max_queued_requests=config.serve.max_queued_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        logging_config=log,
    )
    shared = config.serve.topology == "shared"
    return ingress.bind(settings, keys, None if shared else deployer.bind(settings))


def _model_app(config: Config) -> serve.RunTarget:
    """What must run before the ingress: the ensemble, or the generalist."""
    if config.serve.topology == "shared":
        return serve.RunTarget(ensemble_app(config), name=ENSEMBLE_APP, route_prefix=None)
    return serve.RunTarget(replica_app(config, None), name=GENERALIST_APP, route_prefix=None)


def build(args: dict[str, Any]) -> serve.Application:
    """The ingress application for a Serve config file; `args` are the sections of the configuration."""
    config = Config.model_validate(args)
    return ingress_app(config, check_exposure(config))


def build_generalist(args: dict[str, Any]) -> serve.Application:
    """The generalist's application for the same Serve config file; `args` as in `build`."""
    return replica_app(Config.model_validate(args), None)


def check_exposure(config: Config) -> ApiKeys:
    """The endpoint's API keys.

    Raises:
        ServingError: the address can be reached from other machines, and neither a key nor `no_auth` is set.
        ConfigError: the key file cannot be read or holds no key.
    """
    keys = ApiKeys.from_env_and_file(os.environ, config.serve.api_key_file)
    if not keys.required and not config.serve.no_auth and not _is_loopback(config.serve.host):
        raise ServingError(
            f"serve.host {config.serve.host} can be reached from other machines, and there is no API key; "
            "set SEE_API_KEY or serve.api_key_file, or use --no-auth"
        )
    return keys


def start(config: Config) -> str:
    """Start the endpoint on the Ray cluster that this process is connected to. Returns its URL once every expert of
    the store's head is live.

    Raises:
        BaseModelError: the base model cannot be found or read.
        ServingError: no key for a public address, the port is taken, or something did not start.
    """
    keys = check_exposure(config)
    if running():
        raise ServingError("this Ray cluster serves an endpoint already; stop it first, or use another cluster")
    host, port = config.serve.host, config.serve.port
    _check_port(host, port)
    find(config.base_model)  # fetch and convert it once, before all replicas need it
    rate = config.serve.trace_sample_rate
    tracing = TracingConfig(enabled=rate > 0, exporter_import_path=EXPORTER, sampling_ratio=rate)
    serve.start(
        http_options={"host": host, "port": port, "request_timeout_s": config.serve.request_timeout_s},
        tracing_config=tracing,
    )
    try:
        ingress = serve.RunTarget(ingress_app(config, keys), name=INGRESS_APP, route_prefix="/")
        serve.run_many([_model_app(config), ingress])
    except (RuntimeError, RayServeException) as error:
        raise ServingError(f"the endpoint did not start: {_last_error(error)}") from error
    while live().version < 0:
        time.sleep(0.2)
    return f"http://{'[' + host + ']' if ':' in host else host}:{port}"


def running() -> bool:
    """Whether this Ray cluster serves an endpoint."""
    return INGRESS_APP in serve.status().applications


def stop() -> None:
    """Stop the endpoint, the ingress first, so that no new requests arrive. Other Serve applications of the cluster
    go on running."""
    running = set(serve.status().applications)
    ours = {name for name in running if name == INGRESS_APP or name.startswith("see-")}
    if running == ours:
        serve.shutdown()
        return
    for name in sorted(ours, key=lambda name: name != INGRESS_APP):
        serve.delete(name)


def live() -> Live:
    """What the running endpoint serves."""
    if ENSEMBLE_APP in serve.status().applications:
        live: Live = serve.get_app_handle(ENSEMBLE_APP).live.remote().result()
    else:
        live = serve.get_deployment_handle("Deployer", INGRESS_APP).live.remote().result()
    return live


def about_replicas() -> dict[str, dict[str, Any]]:
    """What a replica of each application reports of itself, its process id for example, by name: the generalist and
    all live experts, or the ensemble."""
    if ENSEMBLE_APP in serve.status().applications:
        apps = {"ensemble": ENSEMBLE_APP}
    else:
        apps = {"generalist": GENERALIST_APP, **{expert.name: expert.app for expert in live().experts}}
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
