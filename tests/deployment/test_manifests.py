"""deploy/: manifests that Kubernetes takes, and that fit the server."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.conftest import ROOT, Run, files_of, hub_environment
from tests.hub_server import FakeHub
from tests.serving.http.conftest import Server

DEPLOY = ROOT / "deploy"
KUBERNETES = ("1.30", "1.34")
"""The oldest and the newest version that the manifests are checked for."""

Manifest = dict[str, Any]


def rendered(folder: str) -> list[Manifest]:
    """What kustomize makes of a folder."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    done = subprocess.run(["kubectl", "kustomize", DEPLOY / folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # deprecations
    return list(yaml.safe_load_all(done.stdout))


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def read(name: str) -> Manifest:
    manifest: Manifest = yaml.safe_load((DEPLOY / name).read_text("utf-8"))
    return manifest


def server_arguments(arguments: list[str]) -> dict[str, Any]:
    """The options that `robustfeat serve` gets."""
    from robustfeat.cli.serve_command import command

    name, *options = arguments
    assert name == "serve"
    return command.make_context("serve", options).params


@pytest.fixture(scope="module")
def deployment() -> Manifest:
    return read("base/deployment.yaml")


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("folder", ["base", "overlays/production"])
def test_kubernetes_takes_the_manifests(folder: str, version: str) -> None:
    ours = [manifest for manifest in rendered(folder) if "monitoring.coreos.com" not in manifest["apiVersion"]]
    assert len(ours) >= 5
    for manifest in ours:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_documented_patch_mounts_what_the_server_reads(tmp_path: Path) -> None:
    """A manifest, a head and keys in docs/deploy.md, as a patch of deploy/base."""
    page = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    (patch,) = re.findall(r"<!-- a manifest, a head and keys -->\n```yaml\n(.*?)```", page, re.DOTALL)
    shutil.copytree(DEPLOY / "base", tmp_path / "base")
    (tmp_path / "patch.yaml").write_text(patch)
    (tmp_path / "kustomization.yaml").write_text("resources: [base]\npatches: [{path: patch.yaml}]\n")
    found = of_kind(rendered(str(tmp_path)), "Deployment")
    kubernetes_validate.validate(found, KUBERNETES[-1], strict=True)
    spec = found["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    options = server_arguments(container["args"])
    sources = {volume["name"]: volume for volume in spec["volumes"]}
    places = {mount["mountPath"]: sources[mount["name"]] for mount in container["volumeMounts"]}
    assert places.keys() == {"/tmp", "/cache", "/manifest", "/keys", "/heads/clothes-v1"}
    assert f"--from-file={options['manifest'].name}" in page
    assert f"--from-file={options['keys'].name}=" in page
    created = set(re.findall(r"create (?:secret generic|configmap) ([\w-]+) --namespace features", page))
    mounted = [places[str(options[name].parent)] for name in ("manifest", "keys")] + [places["/heads/clothes-v1"]]
    names = [(one.get("configMap") or {}).get("name") or one["secret"]["secretName"] for one in mounted]
    assert set(names) == created
    assert '`clothes = "/heads/clothes-v1"`' in page


def test_the_schemas_refuse_what_is_wrong(deployment: Manifest) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(deployment).replace("readinessProbe", "readyProbe"))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES[-1], strict=True)


def test_the_probes_and_options_are_the_servers(deployment: Manifest, server: Server) -> None:
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server.get(container[probe]["httpGet"]["path"]).status == 200
    options = server_arguments(container["args"])
    assert options["port"] == container["ports"][0]["containerPort"]
    assert options["hosts"] == (read("base/service.yaml")["metadata"]["name"],)
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > pause + options["drain"] + 5


def test_the_image_is_the_one_that_is_built(deployment: Manifest) -> None:
    text = (ROOT / "docker" / "serve.Dockerfile").read_text("utf-8")
    user = re.findall(r"^USER (\d+):", text, re.M)[-1]
    assert deployment["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == int(user)
    mounted = {mount["mountPath"] for mount in deployment["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert {"/tmp", re.findall(r"XDG_CACHE_HOME=(/\S+)", text)[0]} == mounted


def assert_restricted(pod: Manifest, container: Manifest) -> None:
    """What the profile `restricted` of Kubernetes' Pod Security Standards asks of a container."""
    settings = {**pod.get("securityContext", {}), **container["securityContext"]}
    assert settings["runAsNonRoot"] is True
    assert settings["runAsUser"] != 0
    assert settings["allowPrivilegeEscalation"] is False
    assert settings["capabilities"] == {"drop": ["ALL"]}
    assert settings["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_pods_are_restricted() -> None:
    pod = read("base/deployment.yaml")["spec"]["template"]["spec"]
    patch = read("overlays/production/deployment.yaml")["spec"]["template"]["spec"]
    for container in (*pod["containers"], *patch["initContainers"]):
        assert_restricted(pod, container)
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    for container in read("kserve/runtime.yaml")["spec"]["containers"]:
        assert_restricted({}, container)


def test_the_selectors_find_the_pods(deployment: Manifest) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for name in ("service", "disruption-budget", "network-policy"):
        spec = read(f"base/{name}.yaml")["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        assert selector.get("matchLabels", selector) == labels
    monitor = read("monitoring/service-monitor.yaml")["spec"]
    service = read("base/service.yaml")
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]


def test_the_autoscaler_follows_a_metric_of_the_server(server: Server) -> None:
    metrics = read("base/autoscaler.yaml")["spec"]["metrics"]
    (name,) = (metric["pods"]["metric"]["name"] for metric in metrics if metric["type"] == "Pods")
    assert f"\n{name}{{" in server.get("/metrics").body.decode()
    (rule,) = read("monitoring/adapter.yaml")["rules"]["custom"]
    assert rule["name"]["as"] == name == rule["seriesQuery"].partition("{")[0]


def test_the_alerts_are_those_of_compose() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yaml").read_text("utf-8"))
    assert read("monitoring/alerts.yaml")["spec"] == compose


def test_the_init_container_fills_the_cache_that_the_server_reads(
    robustfeat: Run, hub: FakeHub, one_file: Path, tmp_path: Path
) -> None:
    """The commands of deploy/overlays/production, with a Hub for the first of them only."""
    repo = hub.add("org/name", files_of(one_file))
    environment = hub_environment(hub, tmp_path / "cache")
    config = read("overlays/production/kustomization.yaml")["configMapGenerator"][0]["literals"]
    assert [literal.partition("=")[0] for literal in config] == ["MODEL", "REVISION", "CONFIG_HASH"]
    values = {"MODEL": "org/name", "REVISION": repo.branches["main"]}
    values["CONFIG_HASH"] = hashlib.sha256((one_file / "config.json").read_bytes()).hexdigest()
    spec = read("overlays/production/deployment.yaml")["spec"]["template"]["spec"]
    (init,), (main,) = spec["initContainers"], spec["containers"]

    def arguments(container: Manifest) -> list[str]:
        declared = {entry["name"] for entry in container["env"]}
        return [
            re.sub(r"\$\((\w+)\)", lambda match: values[match[1]] if match[1] in declared else "", one)
            for one in container["args"]
        ]

    done = robustfeat(*arguments(init), env=environment)
    assert done.returncode == 0, done.stderr
    asked = len(hub.requests)
    keys = tmp_path / "keys"
    keys.write_text("team 5tUgR0secretsecret\n")
    settings = {entry["name"]: entry["value"] for entry in main["env"] if "value" in entry}
    options = [one.replace("/keys/keys", str(keys)) for one in arguments(main)[1:]]
    options = [
        one for one in options if not one.startswith(("--host", "--port", "--log-format"))
    ]  # as `Server` has them
    server = Server(*options, **{**environment, **settings})
    assert server.get("/health/ready").status == 200
    assert server.stop() == 0
    assert len(hub.requests) == asked
    assert (
        server_arguments(["serve", *options])["drain"]
        == server_arguments(read("base/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]["args"])["drain"]
    )


# Of kserve 0.21's models V1alpha1ServingRuntimeSpec, V1alpha1SupportedModelFormat, V1beta1PredictorSpec and
# V1beta1ModelSpec: the fields that our files use, with their types.
RUNTIME = {"supportedModelFormats": list, "protocolVersions": list, "containers": list}
FORMAT = {"name": str, "version": str, "autoSelect": bool}
PREDICTOR = {"minReplicas": int, "maxReplicas": int, "model": dict}
MODEL = {"runtime": str, "modelFormat": dict, "protocolVersion": str, "storageUri": str}


def assert_fields(found: Manifest, known: Mapping[str, type]) -> None:
    assert {name: type(value) for name, value in found.items()} == {name: known[name] for name in found}


def test_kserve_knows_the_fields() -> None:
    runtime, service = read("kserve/runtime.yaml"), read("kserve/inference-service.yaml")
    assert_fields(runtime["spec"], RUNTIME)
    for one in runtime["spec"]["supportedModelFormats"]:
        assert_fields(one, FORMAT)
    assert set(service["spec"]) == {"predictor"}
    assert_fields(service["spec"]["predictor"], PREDICTOR)
    assert_fields(service["spec"]["predictor"]["model"], MODEL)
    # A runtime's containers are those of a pod.
    pod: Manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "features"}}
    pod["spec"] = {"containers": runtime["spec"]["containers"]}
    kubernetes_validate.validate(pod, KUBERNETES[-1], strict=True)


def test_kserve_asks_what_the_server_answers(server: Server) -> None:
    runtime, service = read("kserve/runtime.yaml"), read("kserve/inference-service.yaml")
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"  # by this name KServe finds it
    predictor = service["spec"]["predictor"]["model"]
    assert predictor["runtime"] == runtime["metadata"]["name"]
    assert predictor["modelFormat"]["name"] in {entry["name"] for entry in runtime["spec"]["supportedModelFormats"]}
    assert predictor["protocolVersion"] in runtime["spec"]["protocolVersions"]
    options = server_arguments([one.replace("{{.Name}}", "robustfeat") for one in container["args"]])
    assert options["models"] == ("robustfeat=/mnt/models",)  # where KServe puts what storageUri names
    assert options["port"] == container["ports"][0]["containerPort"]
    path = container["readinessProbe"]["httpGet"]["path"].replace("{{.Name}}", "robustfeat")
    assert server.ask("GET", path, headers={"host": "features.default.example.com"}).json == {
        "name": "robustfeat",
        "ready": True,
    }
