"""deploy/kubernetes: valid by Kubernetes' own schemas, and true to the command, the settings and itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from command_lines import DEPLOY, check_all, load

from broker.topology import PARTICIPANT
from fluffle.config import ProcessSection

FOLDER = DEPLOY / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text("utf-8"))
FILES = sorted(set(FOLDER.glob("*.yaml")) - {FOLDER / "kustomization.yaml"})
Object = dict[str, Any]


def objects(*files: Path) -> Iterator[Object]:
    for file in files:
        yield from yaml.safe_load_all(file.read_text("utf-8"))


def named(kind: str) -> dict[str, Object]:
    return {thing["metadata"]["name"]: thing for thing in objects(*FILES) if thing["kind"] == kind}


STATEFUL = named("StatefulSet")
PODS = {name: thing["spec"]["template"]["spec"] for name, thing in STATEFUL.items()}
each_pod = pytest.mark.parametrize("pod", PODS.values(), ids=list(PODS))


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def valid(thing: Object) -> bool:
    return bool(kubernetes_validate.validate(thing, kubernetes_validate.latest_version(), strict=True))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_objects_are_valid(file: Path) -> None:
    found = list(objects(file))
    assert found
    assert all(valid(thing) for thing in found)


def test_a_misspelt_field_would_be_caught() -> None:
    thing = next(objects(FOLDER / "namespace.yaml"))
    with pytest.raises(kubernetes_validate.ValidationError):
        valid({**thing, "spek": {}})


def test_everything_but_secrets_is_applied() -> None:
    assert {FOLDER / name for name in KUSTOMIZATION["resources"]} == {
        file for file in FILES if "example" not in file.name
    }
    assert not [
        thing for file in KUSTOMIZATION["resources"] for thing in objects(FOLDER / file) if is_secret(thing)
    ]


def is_secret(thing: Object) -> bool:
    return bool(thing["kind"] == "Secret")


def test_kustomize_renders_it() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    rendered = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, timeout=60)
    assert rendered.returncode == 0, rendered.stderr
    for thing in yaml.safe_load_all(rendered.stdout):
        assert valid(thing)
        assert thing["kind"] == "Namespace" or thing["metadata"]["namespace"] == "fluffle"


def test_every_command_line_is_one_of_fluffle() -> None:
    ours = [one for pod in PODS.values() for one in containers(pod) if one["image"].startswith("fluffle-")]
    assert len(ours) == 3
    check_all(one["args"] for one in ours)


@each_pod
def test_pods_are_locked_down(pod: Object) -> None:
    assert pod["enableServiceLinks"] is False, "a Service `fluffle-x` would become a setting FLUFFLE_X_..."
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for one in containers(pod):
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert one["resources"]["requests"]["cpu"]
        assert one["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", list(STATEFUL))
def test_references_lead_somewhere(name: str) -> None:
    spec, pod = STATEFUL[name]["spec"], PODS[name]
    assert spec["serviceName"] in named("Service")
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claims = {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}
    for one in containers(pod):
        for mount in one["volumeMounts"]:
            assert mount["name"] in volumes.keys() | claims
            held = contents(volumes.get(mount["name"], {}))
            assert "subPath" not in mount or mount["subPath"] in held


def contents(volume: Object) -> dict[str, str]:
    """The files of a configuration or secret that a volume names, which must exist."""
    if "configMap" in volume:
        return dict(named("ConfigMap")[volume["configMap"]["name"]]["data"])
    if "secret" in volume:
        return dict(named("Secret")[volume["secret"]["secretName"]]["stringData"])
    return {}


def test_policies_select_pods_that_exist() -> None:
    labels = [thing["spec"]["template"]["metadata"]["labels"] for thing in STATEFUL.values()]
    budget = named("PodDisruptionBudget")["aggregator"]["spec"]["selector"]["matchLabels"]
    assert budget in [{"app.kubernetes.io/name": one["app.kubernetes.io/name"]} for one in labels]
    text = (FOLDER / "network.yaml").read_text("utf-8")
    selected = set(re.findall(r"app\.kubernetes\.io/name: (\w+)", text))
    for listed in re.findall(r"values: \[([\w, ]+)\]", text):
        selected |= set(listed.split(", "))
    assert selected == {one["app.kubernetes.io/name"] for one in labels}


def test_pods_of_workers_are_participants_with_a_password_each() -> None:
    workers = STATEFUL["p"]
    names = [f"p-{ordinal}" for ordinal in range(workers["spec"]["replicas"])]
    assert all(re.fullmatch(PARTICIPANT, name) for name in names)
    passwords = named("Secret")["workers"]["stringData"]
    assert passwords == {f"{name}.toml": f'{name} = "<password>"\n' for name in names}
    (mount,) = [one for one in PODS["p"]["containers"][0]["volumeMounts"] if one["name"] == "secrets"]
    assert mount["subPathExpr"] == "$(PARTICIPANT).toml", "nobody shall see the others'"


def test_no_secret_is_here() -> None:
    for secret in named("Secret").values():
        assert all("<" in text for text in secret["stringData"].values())


def test_a_standby_is_ready_and_nothing_that_is_alive_is_restarted() -> None:
    for name in ("aggregator", "p"):
        (one,) = PODS[name]["containers"]
        alive, ready = one["livenessProbe"], one["readinessProbe"]
        assert (alive["httpGet"]["path"], ready["httpGet"]["path"]) == ("/healthz", "/readyz")
        assert alive["httpGet"]["port"] == ready["httpGet"]["port"] == one["ports"][0]["name"]
        assert f"--http=0.0.0.0:{one['ports'][0]['containerPort']}" in one["args"]
        patience_s = alive["periodSeconds"] * alive["failureThreshold"]
        assert patience_s > ProcessSection().watchdog_s, "the watchdog says where it hung"
    assert STATEFUL["aggregator"]["spec"]["replicas"] == 2
    assert STATEFUL["rabbitmq"]["spec"]["replicas"] == 1


def test_rabbitmq_gets_the_configuration_that_was_tested() -> None:
    held = named("ConfigMap")["rabbitmq"]["data"]
    assert held["rabbitmq.conf"] == (DEPLOY / "rabbitmq.conf").read_text("utf-8")
    limit = PODS["rabbitmq"]["containers"][0]["resources"]["limits"]["memory"]
    override_mb = int(re.findall(r"= (\d+)MB", held["memory.conf"])[0])
    assert override_mb * 10**6 < int(limit.removesuffix("Gi")) << 30


def test_the_run_can_be_loaded(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    text = named("ConfigMap")["aggregator"]["data"]["run.toml"]
    file.write_text(textwrap.dedent(text))
    _, task, out = PODS["aggregator"]["initContainers"][0]["args"]
    assert f'task = "{task}"' in text
    assert f'initial = "{out}"' in text
    config = load(file)
    assert config.round.participants <= STATEFUL["p"]["spec"]["replicas"]
    assert config.evaluation.mode != "central"
