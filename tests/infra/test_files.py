"""The files that no engine has run here: each against the schema that is published for it, and against the project."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
KUBERNETES = ("1.30", "1.37")
#: Of the reference of ray.io/v1, those that are used here. Their pods are checked as Kubernetes' own.
CLUSTER_FIELDS = {
    "spec": {
        "rayVersion", "authOptions", "enableInTreeAutoscaling",
        "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
    },
    "authOptions": {"mode", "secretName"},
    "autoscalerOptions": {"idleTimeoutSeconds", "resources", "securityContext"},
    "headGroupSpec": {"serviceType", "rayStartParams", "template"},
    "workerGroupSpecs": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}  # fmt: skip


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
    return found


def objects() -> dict[tuple[str, str], dict[str, Any]]:
    paths = sorted((INFRA / "kuberay").glob("*.yaml"))
    documents = [one for path in paths for one in yaml.safe_load_all(path.read_text())]
    return {(one["kind"], one["metadata"]["name"]): one for one in documents}


def cluster() -> dict[str, Any]:
    return objects()["RayCluster", "maskmill"]


def pod_templates() -> dict[str, dict[str, Any]]:
    spec = cluster()["spec"]
    groups = {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}
    worker = objects()["Deployment", "maskmill-prefect-worker"]["spec"]["template"]
    return {name: group["template"] for name, group in groups.items()} | {"prefect-worker": worker}


# ── compose ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(path: Path) -> str:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout + answer.stderr if answer.returncode else ""


def test_compose_follows_its_published_schema(tmp_path: Path) -> None:
    assert refused(INFRA / "compose.yaml") == ""
    wrong = compose()
    wrong["services"]["ray-head"]["helthcheck"] = {}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    assert "helthcheck" in refused(tmp_path / "wrong.yaml")


def test_compose_has_the_parts_of_make_up_and_is_reached_from_this_machine_only() -> None:
    services = compose()["services"]
    assert {"postgres", "store", "prefect-server", "ray-head", "ray-node", "prefect-worker"} <= set(services)
    for name, service in services.items():
        assert not {"privileged", "network_mode"} & set(service), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        image = service["image"]
        assert ":" in image and not image.endswith(":latest"), name
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_completed_successfully" or "healthcheck" in services[other], name
    assert set(re.findall(r"\$\{([A-Z_]+):-", (INFRA / "compose.yaml").read_text())) == {"DEVICE", "TORCH_INDEX_URL"}
    for secret in ("POSTGRES_PASSWORD", "STORE_PASSWORD", "RAY_AUTH_TOKEN"):
        assert not re.search(rf"\${{{secret}(?!:\?)", (INFRA / "compose.yaml").read_text()), f"{secret} has no default"


def options_of(command: list[str]) -> set[str]:
    """Options of a command of Ray or Prefect, as the installed one has them."""
    if command[0] == "ray":
        from ray.scripts import scripts

        return {option for parameter in getattr(scripts, command[1]).params for option in parameter.opts}
    answer = subprocess.run(
        [sys.executable, "-m", "prefect", *command[1:3], "--help"], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"--[a-z][a-z-]+", answer.stdout))


@pytest.mark.parametrize("name", ["prefect-server", "ray-head", "ray-node", "prefect-worker"])
def test_commands_of_containers_have_only_options_that_exist(name: str) -> None:
    command = [str(word) for word in compose()["services"][name]["command"]]
    given = {word.partition("=")[0] for word in command if word.startswith("--")}
    assert given and given <= options_of(command)
    if name == "prefect-worker":
        container = pod_templates()["prefect-worker"]["spec"]["containers"][0]
        assert container["command"] == command


# ── Kubernetes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_objects_follow_the_schema(version: str) -> None:
    for (kind, _), one in objects().items():
        if kind != "RayCluster":
            kubernetes_validate.validate(one, version, strict=True)
    for name, template in pod_templates().items():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
        kubernetes_validate.validate(pod, version, strict=True)
        wrong = copy.deepcopy(pod)
        wrong["template"]["spec"]["containers"][0]["imagee"] = "maskmill"
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, version, strict=True)


def test_the_cluster_has_only_fields_of_its_reference() -> None:
    spec = cluster()["spec"]
    assert set(spec) <= CLUSTER_FIELDS["spec"]
    for name in set(CLUSTER_FIELDS) - {"spec"}:
        for part in spec[name] if isinstance(spec[name], list) else [spec[name]]:
            assert set(part) <= CLUSTER_FIELDS[name], name


def test_rays_autoscaler_reads_a_gpu_group_that_starts_from_none() -> None:
    """Its own reading of the object, as it does every few seconds in the cluster."""
    reading = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    kinds = reading._derive_autoscaling_config_from_ray_cr(cluster())["available_node_types"]
    assert set(kinds) == {"headgroup", "gpu"}
    assert (kinds["gpu"]["min_workers"], kinds["gpu"]["max_workers"]) == (0, 8)
    assert kinds["gpu"]["resources"]["GPU"] == 1 and kinds["headgroup"]["resources"]["CPU"] == 0
    options = options_of(["ray", "start"])
    for group in (cluster()["spec"]["headGroupSpec"], *cluster()["spec"]["workerGroupSpecs"]):
        assert {f"--{name}" for name in group["rayStartParams"]} <= options


def test_rights_are_the_least() -> None:
    found = objects()
    for name, template in pod_templates().items():
        spec = template["spec"]
        account = found["ServiceAccount", spec["serviceAccountName"]]
        assert spec["securityContext"]["runAsNonRoot"] is True
        if name != "head":
            assert spec["automountServiceAccountToken"] is False
            assert account["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert "memory" in container["resources"]["limits"]
            assert not [one for one in container.get("env", []) if "KEY" in one["name"] or "PASSWORD" in one["name"]]
    (role,) = [one for (kind, _), one in found.items() if kind in ("Role", "ClusterRole")]
    assert role["kind"] == "Role"
    verbs = {rule["resources"][0]: set(rule["verbs"]) for rule in role["rules"]}
    assert verbs == {"pods": {"get", "list", "watch"}, "rayclusters": {"get", "patch"}}
    (binding,) = [one for (kind, _), one in found.items() if kind == "RoleBinding"]
    assert [subject["name"] for subject in binding["subjects"]] == ["maskmill-ray-head"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_the_bucket_policy_lets_nobody_delete_a_part() -> None:
    policy = json.loads((INFRA / "kuberay" / "bucket-policy.json").read_text())
    allowed = {
        (action, resource)
        for statement in policy["Statement"]
        for action in statement["Action"]
        for resource in statement["Resource"]
    }
    assert not [action for action, _ in allowed if "*" in action]
    assert {resource.partition("BUCKET")[2] for action, resource in allowed if action == "s3:DeleteObject"} == {
        "/masks/runs/*",
        "/masks/_tmp/*",
    }
    assert ("s3:PutObject", "arn:aws:s3:::BUCKET/photos/*") not in allowed
    assert ("s3:PutObject", "arn:aws:s3:::BUCKET/masks/*") in allowed


# ── image ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (INFRA / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    pairs = [line.split(maxsplit=1) for line in lines]
    known = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    assert {word for word, _ in pairs} <= known
    return [(word, rest) for word, rest in pairs]


def test_the_image_copies_what_there_is_and_all_that_installs() -> None:
    sources = [word.rstrip("/") for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(sources)
    assert {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"]} <= set(sources)
    let_in = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert let_in == set(sources)


def test_the_image_installs_as_the_makefile_does() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (how,) = re.findall(r"^INSTALL := \$\(BIN\)/(python -m pip install -c constraints.txt)$", makefile, re.M)
    installs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    assert installs and all(rest.startswith(how) for rest in installs)
    (extras,) = [re.findall(r"'\.\[([a-z,]+)\]'", rest)[0] for rest in installs if "'.[" in rest]
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    assert "dev" not in extras.split(",")
    (command,) = [json.loads(rest) for name, rest in instructions() if name == "CMD"]
    assert command[0] in PROJECT["project"]["scripts"]


def test_the_image_has_both_devices_a_python_that_is_allowed_and_no_root() -> None:
    stages = [rest for name, rest in instructions() if name == "FROM"]
    bases = {rest.split()[-1]: rest.split()[0] for rest in stages if " AS " in rest}
    assert set(bases) == {"cpu", "cuda"} and stages[-1] == "${DEVICE}"
    for base in bases.values():
        version = tuple(map(int, re.findall(r"python:(\d+)\.(\d+)-", base)[0]))
        assert version >= (3, 11)
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["10001"]
    assert {template["spec"]["securityContext"]["runAsUser"] for template in pod_templates().values()} == {10001}


def test_what_was_never_run_is_said() -> None:
    page = (INFRA / "README.md").read_text()
    for path in INFRA.rglob("*"):
        if path.is_file() and path.name != "README.md" and "__pycache__" not in path.parts:
            assert path.name in page, f"infra/README.md says nothing of {path.name}"
    assert "never" in page.lower()
