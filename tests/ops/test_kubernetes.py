# SPDX-License-Identifier: Apache-2.0
"""The manifests, as kustomize builds them, against Kubernetes' and the operator's schemas."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from himap_server.security.keys import read_keys

from deploy.kubernetes import prometheus_rule
from tests.ops.conftest import ROOT, program
from tests.programs import OPERATOR_SCHEMAS

KUBERNETES = ROOT / "deploy" / "kubernetes"
# The oldest that the manifests are for, and the latest that the schemas are published of.
VERSIONS = ("1.31", "1.37")
_OPERATOR = """
import { readFileSync } from 'node:fs';
const operator = await import(process.argv[1]);
const manifest = JSON.parse(readFileSync(0));
try {
    new operator[manifest.kind](manifest).validate();
} catch (error) {
    console.log(`invalid: ${error.message}`);
}
"""


def build(overlay: str) -> dict[str, dict[str, Any]]:
    """An overlay's manifests by kind."""
    command = [program("kustomize"), "build", str(KUBERNETES / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}


def operators_complaint(manifest: dict[str, Any]) -> str:
    """What is wrong with a custom resource of the Prometheus operator."""
    schemas = OPERATOR_SCHEMAS / "monitoring.coreos.com/v1/index.js"
    done = subprocess.run(
        [program("node"), "--input-type=module", "-e", _OPERATOR, "--", str(schemas)],
        input=json.dumps(manifest), text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def manifests(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return build(request.param)


def container(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The one container."""
    (found,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_schemas(manifests: dict[str, dict[str, Any]], version: str) -> None:
    ours = {kind for kind in manifests if kind not in {"ServiceMonitor", "PrometheusRule"}}
    assert len(ours) == 6
    for kind in ours:
        kubernetes_validate.validate(manifests[kind], version, strict=True)
    broken = json.loads(json.dumps(manifests["Deployment"]))
    broken["spec"]["template"]["spec"]["contianers"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_operators_schemas(manifests: dict[str, dict[str, Any]]) -> None:
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert operators_complaint(manifests[kind]) == ""
    broken = json.loads(json.dumps(manifests["ServiceMonitor"]))
    broken["spec"]["endpoints"] = "http"
    assert "endpoints" in operators_complaint(broken)


def test_the_rules_are_those_of_prometheus() -> None:
    assert prometheus_rule.main(["--check"]) == 0


def test_labels_meet(manifests: dict[str, dict[str, Any]]) -> None:
    template = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    service = manifests["Service"]
    for selector in (
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= template.items()
    monitor = manifests["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    # The job that rules and alerts name.
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "himap"
    (port,) = service["spec"]["ports"]
    (own,) = container(manifests)["ports"]
    assert monitor["endpoints"][0]["port"] == port["name"]
    assert port["targetPort"] == own["name"]
    assert manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": manifests["Deployment"]["metadata"]["name"],
    }
    assert "replicas" not in manifests["Deployment"]["spec"]


def test_there_is_time_to_drain(manifests: dict[str, dict[str, Any]]) -> None:
    pod, gateway = manifests["Deployment"]["spec"]["template"]["spec"], container(manifests)
    environment = {entry["name"]: entry.get("value") for entry in gateway["env"]}
    sleep, seconds = gateway["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    grace = int(environment["HIMAP_GRACE_SECONDS"])
    # 10 for what comes after the drain: the answers' last bytes, the engine's processes.
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + grace + 10


def test_probes_and_keys(manifests: dict[str, dict[str, Any]]) -> None:
    gateway = container(manifests)
    paths = {name: gateway[f"{name}Probe"]["httpGet"]["path"] for name in
             ("startup", "liveness", "readiness")}  # fmt: skip
    assert paths == {
        "startup": "/health/live",
        "liveness": "/health/live",
        "readiness": "/health/ready",
    }
    environment = {entry["name"]: entry.get("value") for entry in gateway["env"]}
    mounts = {mount["name"]: mount for mount in gateway["volumeMounts"]}
    folder = mounts["api-keys"]["mountPath"]
    assert environment["HIMAP_API_KEYS_FILE"] == f"{folder}/keys.yaml"
    assert "subPath" not in mounts["api-keys"]
    security = gateway["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert gateway["resources"]["limits"]["memory"]


def test_the_example_of_the_secret_is_a_file_of_keys(tmp_path: Path) -> None:
    manifest = yaml.safe_load((KUBERNETES / "api-keys.example.yaml").read_text())
    kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
    (tmp_path / "keys.yaml").write_text(manifest["stringData"]["keys.yaml"])
    assert [key.name for key in read_keys(tmp_path / "keys.yaml")] == ["team-a"]


def test_the_autoscaler_asks_for_what_the_adapter_offers(
    manifests: dict[str, dict[str, Any]],
) -> None:
    adapter = yaml.safe_load((KUBERNETES / "prometheus-adapter.values.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    (metric,) = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


def test_the_example_of_a_store_of_limits(manifests: dict[str, dict[str, Any]]) -> None:
    text = (KUBERNETES / "limits-store.example.yaml").read_text()
    store = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(text)}
    for manifest in store.values():
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)
    pod = store["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert store["Service"]["spec"]["selector"] == labels
    assert f"@{store['Service']['metadata']['name']}\n" in text
    environment = {entry["name"]: entry for entry in container(manifests)["env"]}
    url = environment["HIMAP_LIMITS_STORAGE"]["valueFrom"]["secretKeyRef"]
    (password,) = pod["spec"]["containers"][0]["env"]
    assert (url["key"], url["optional"]) == ("url", True)
    assert password["valueFrom"]["secretKeyRef"]["name"] == url["name"]
    # Each may talk to the other.
    (incoming,) = store["NetworkPolicy"]["spec"]["ingress"][0]["from"]
    gateway = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert incoming["podSelector"]["matchLabels"].items() <= gateway.items()
    outgoing = [
        peer["podSelector"]["matchLabels"]
        for rule in manifests["NetworkPolicy"]["spec"]["egress"]
        for peer in rule["to"]
        if "podSelector" in peer
    ]
    assert outgoing == [labels]
