"""The files in cluster/ against the schemas of what reads them: Ray's launcher, KubeRay, Ray Serve.

KubeRay's field names below are those of its Go types, `ray-operator/apis/ray/v1/*_types.go`, and of its API
reference (KubeRay 1.7); pods' are those of Kubernetes' core/v1. Only fields that our files could use are listed.
"""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"
LAUNCHER = ["local.yaml", "aws.yaml", "gcp.yaml"]
KUBERAY = ["raycluster.gpu.yaml", "rayjob.learn.yaml", "rayservice.see.yaml"]

FIELDS: dict[str, str] = {
    "RayCluster": "apiVersion kind metadata spec:ClusterSpec",
    "RayJob": "apiVersion kind metadata spec:JobSpec",
    "RayService": "apiVersion kind metadata spec:ServiceSpec",
    "ClusterSpec": "headGroupSpec:Head workerGroupSpecs:Worker rayVersion enableInTreeAutoscaling "
    "autoscalerOptions:Autoscaler headServiceAnnotations suspend gcsFaultToleranceOptions:Redis",
    "Head": "serviceType headService enableIngress rayStartParams template:Template",
    "Worker": "groupName replicas minReplicas maxReplicas numOfHosts idleTimeoutSeconds rayStartParams "
    "template:Template scaleStrategy suspend",
    "Autoscaler": "resources:Resources image imagePullPolicy env envFrom volumeMounts securityContext "
    "idleTimeoutSeconds upscalingMode version",
    "Redis": "redisAddress redisUsername redisPassword externalStorageNamespace",
    "JobSpec": "activeDeadlineSeconds backoffLimit rayClusterSpec:ClusterSpec submitterPodTemplate metadata "
    "clusterSelector submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode "
    "entrypointResources entrypointNumCpus entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend",
    "ServiceSpec": "serveConfigV2 rayClusterConfig:ClusterSpec serveService upgradeStrategy:Upgrade "
    "excludeHeadPodFromServeSvc rayClusterDeletionDelaySeconds suspend",
    "Upgrade": "type clusterUpgradeOptions",
    "Template": "metadata spec:PodSpec",
    "PodSpec": "containers:Container volumes:Volume tolerations:Toleration nodeSelector serviceAccountName "
    "terminationGracePeriodSeconds imagePullSecrets affinity initContainers",
    "Container": "name image imagePullPolicy command args env:Env envFrom ports:Port resources:Resources "
    "livenessProbe:Probe readinessProbe:Probe startupProbe:Probe lifecycle:Lifecycle volumeMounts:Mount",
    "Env": "name value valueFrom:ValueFrom",
    "ValueFrom": "secretKeyRef:SecretKey configMapKeyRef fieldRef",
    "SecretKey": "name key optional",
    "Port": "name containerPort protocol",
    "Resources": "requests limits",
    "Probe": "httpGet:HttpGet exec initialDelaySeconds periodSeconds timeoutSeconds failureThreshold successThreshold",
    "HttpGet": "path port scheme",
    "Lifecycle": "preStop postStart",
    "Mount": "name mountPath readOnly subPath",
    "Volume": "name emptyDir persistentVolumeClaim secret configMap hostPath",
    "Toleration": "key operator value effect tolerationSeconds",
}
REQUIRED = {
    "ClusterSpec": {"headGroupSpec", "rayVersion"},
    "Head": {"template"},
    "Worker": {"groupName", "minReplicas", "maxReplicas", "template"},
    "PodSpec": {"containers"},
    "Container": {"name", "image", "resources"},
    "SecretKey": {"name", "key"},
}


def loaded(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def unknown(value: Any, kind: str, where: str = "") -> Iterator[str]:
    """Fields of a manifest that FIELDS does not list, and required ones that are missing, as paths."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from unknown(item, kind, f"{where}[{number}]")
        return
    known = dict([*field.split(":"), ""][:2] for field in FIELDS[kind].split())
    yield from (f"{where}.{field} is missing" for field in REQUIRED.get(kind, set()) - set(value))
    for field, below in value.items():
        if field not in known:
            yield f"{where}.{field} is unknown"
        elif known[field]:
            yield from unknown(below, known[field], f"{where}.{field}")


def nodes(value: Any, key: str) -> Iterator[Any]:
    """All values under a key, at any depth."""
    if isinstance(value, dict):
        for name, below in value.items():
            if name == key:
                yield below
            yield from nodes(below, key)
    elif isinstance(value, list):
        for item in value:
            yield from nodes(item, key)


def pinned_ray() -> str:
    pin = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin
    return pin[1]


def test_every_file_here_is_checked_below() -> None:
    others = {"Containerfile", "grafana.json"}  # test_architecture and test_metrics
    assert {path.name for path in CLUSTER.iterdir()} == {*LAUNCHER, *KUBERAY, *others}


# --- Ray's launcher -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_up_takes_the_file(name: Any) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(loaded(name)))


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_gpu_nodes_come_from_zero_and_the_head_computes_nothing(name: str) -> None:
    config = loaded(name)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    workers = [kind for name, kind in types.items() if name != config["head_node_type"]]
    assert workers
    assert all(kind["min_workers"] == 0 and kind["resources"]["GPU"] >= 1 for kind in workers)
    assert sum(kind["max_workers"] for kind in workers) <= config["max_workers"]


# --- KubeRay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_knows_every_field(name: Any) -> None:
    manifest = loaded(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert list(unknown(manifest, manifest["kind"])) == []


@pytest.mark.parametrize("name", KUBERAY)
def test_ray_start_takes_every_parameter(name: Any) -> None:
    from ray.scripts.scripts import start

    options = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    for given in nodes(loaded(name), "rayStartParams"):
        assert set(given) <= options
        assert all(isinstance(value, str) for value in given.values())


@pytest.mark.parametrize("name", KUBERAY)
def test_what_a_container_mounts_is_a_volume_of_its_pod(name: Any) -> None:
    for template in nodes(loaded(name), "template"):
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        assert {m["name"] for c in template["spec"]["containers"] for m in c["volumeMounts"]} <= volumes


@pytest.mark.parametrize("name", KUBERAY)
def test_secrets_are_named_not_written(name: Any) -> None:
    for variables in nodes(loaded(name), "env"):
        assert all("value" not in variable for variable in variables)
        assert {v["valueFrom"]["secretKeyRef"]["name"] for v in variables} == {"see-secrets"}


@pytest.mark.parametrize("name", KUBERAY)
def test_gpu_workers_may_go_and_ask_for_what_they_are_limited_to(name: Any) -> None:
    for group in (g for groups in nodes(loaded(name), "workerGroupSpecs") for g in groups):
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_jobs_command_is_a_job_here_with_settings_that_exist() -> None:
    from see_ray.config import load_config

    words = loaded("rayjob.learn.yaml")["spec"]["entrypoint"].split()
    assert (ROOT / words[1].removeprefix("/home/ray/see_ray/")).is_file()
    load_config(None, [words[i + 1] for i, word in enumerate(words) if word == "--set"])


# --- images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LAUNCHER, *KUBERAY])
def test_an_image_is_of_this_version_and_of_the_pinned_ray(name: Any) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {image for image in nodes(loaded(name), "image") if isinstance(image, str)}
    assert images == {f"example.com/see-ray:{version}-ray{pinned_ray()}"}


def test_the_image_copies_what_is_there() -> None:
    copied = re.findall(r"^COPY \S+ (.+) \S+$", (CLUSTER / "Containerfile").read_text(), re.MULTILINE)
    assert copied
    assert all((ROOT / name).exists() for names in copied for name in names.split())


def test_the_image_sets_what_a_ray_of_our_own_gets() -> None:
    from see_ray.cluster import WORKER_ENVIRONMENT

    text = (CLUSTER / "Containerfile").read_text()
    assert [name for name, value in WORKER_ENVIRONMENT.items() if f"{name}={value}" not in text] == []


# --- Ray Serve --------------------------------------------------------------------------------------


@pytest.fixture
def serve_config() -> dict[str, Any]:
    return yaml.safe_load(loaded("rayservice.see.yaml")["spec"]["serveConfigV2"])


def test_serve_takes_the_config(serve_config: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(serve_config)


def test_import_paths_resolve_and_settings_exist(serve_config: dict[str, Any]) -> None:
    from see_ray.config import Config

    for app in serve_config["applications"]:
        module, _, name = app["import_path"].partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        Config.model_validate(app["args"])
