"""The manifests of `jobs/kubernetes`: fields that Kubernetes and KubeRay know, values that keep runs safe."""

import copy
import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.support.manifests import FOLDER, crd_schemas, faults, kept_schemas, kind_of, manifests
from treelora_platform.config import load_config
from treelora_platform.recipes import recipe_path

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = kept_schemas()
MANIFESTS = {f"{m['kind']}-{m['metadata']['name']}": m for m in manifests()}
CLUSTER = MANIFESTS["RayCluster-treelora"]["spec"]
JOB = MANIFESTS["RayJob-treelora-trace"]["spec"]
PART = {"app.kubernetes.io/part-of": "treelora"}


def constraint(package):
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def pods():
    """(name, pod template) of every pod that the manifests describe."""
    for name, spec in (("RayCluster", CLUSTER), ("RayJob", JOB["rayClusterSpec"])):
        yield f"{name}-head", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield f"{name}-{group['groupName']}", group["template"]
    yield "submitter", JOB["submitterPodTemplate"]
    yield "mlflow", MANIFESTS["Deployment-treelora-mlflow"]["spec"]["template"]


PODS = dict(pods())
RAY_PODS = {name: pod for name, pod in PODS.items() if name.startswith("Ray")}


def steps(value, path=()):
    """Every place in nested values, as the keys that lead there."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield (*path, key)
        yield from steps(part, (*path, key))


def free_map(path):
    """Whether users choose the last key themselves: labels, selectors, resources."""
    return len(path) > 1 and path[-2] in ("labels", "matchLabels", "requests", "limits", "selector", "rayStartParams")


def altered(manifest, path, change):
    other = copy.deepcopy(manifest)
    node = other
    for key in path[:-1]:
        node = node[key]
    change(node, path[-1])
    return other


def accepted(manifest, like):
    """Whether the schema of another manifest's kind takes it."""
    return not list(faults(manifest, SCHEMAS[kind_of(like)]))


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_is_known_and_of_its_type(name):
    assert list(faults(MANIFESTS[name], SCHEMAS[kind_of(MANIFESTS[name])])) == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_misspelt_field_is_refused_wherever_it_is(name):
    def misspell(node, key):
        node[f"{key}x"] = node.pop(key)

    manifest = MANIFESTS[name]
    fields = [path for path in steps(manifest) if isinstance(path[-1], str) and not free_map(path)]
    assert {("kind",), ("metadata", "name"), ("spec",)} <= set(fields)
    assert [path for path in fields if accepted(altered(manifest, path, misspell), manifest)] == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_wrong_type_is_refused_wherever_it_is(name):
    def retype(node, key):
        node[key] = {} if isinstance(node[key], list) else []

    manifest = MANIFESTS[name]
    assert [path for path in steps(manifest) if accepted(altered(manifest, path, retype), manifest)] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "autoscalerOptions", "version"), "2"),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "2"),
        (("spec", "enableInTreeAutoscaling"), "true"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "memory"), "16 GB"),
    ],
)
def test_a_value_that_kuberay_refuses_is_refused(path, value):
    def put(node, key):
        node[key] = value

    cluster = MANIFESTS["RayCluster-treelora"]
    assert not accepted(altered(cluster, path, put), cluster)


def test_a_crd_is_read_strictly():
    spec = {"type": "object", "required": ["size"], "properties": {"size": {"type": "integer"}}}
    schema = {"type": "object", "properties": {"apiVersion": {}, "kind": {}, "spec": spec}}
    crd = {"group": "x.io", "names": {"kind": "X"}, "versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}
    strict = crd_schemas(yaml.safe_dump({"items": [{"spec": crd}]}))["x.io/v1/X"]
    x = {"apiVersion": "x.io/v1", "kind": "X", "metadata": {"name": "x"}}
    assert list(faults(x | {"spec": {"size": 1}}, strict)) == []
    assert len(list(faults(x | {"spec": {"size": 1, "siez": 2}}, strict))) == 1
    assert len(list(faults(x | {"spec": {}}, strict))) == 1


def test_what_the_operator_checks_beyond_the_schema():
    """KubeRay's ray-operator/controllers/ray/utils/validation.go."""
    for name, longest in (("RayCluster-treelora", 53), ("RayJob-treelora-trace", 47)):
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", MANIFESTS[name]["metadata"]["name"])
        assert len(MANIFESTS[name]["metadata"]["name"]) <= longest
    for pod in RAY_PODS.values():
        assert "restartPolicy" not in pod["spec"]  # the second autoscaler wants its own
    assert tuple(int(part) for part in CLUSTER["rayVersion"].split(".")) >= (2, 52, 0)  # the first with tokens


def test_the_job_brings_the_cluster_along_and_can_be_repeated():
    assert JOB["rayClusterSpec"] == CLUSTER
    assert "clusterSelector" not in JOB  # would exclude backoffLimit
    assert JOB["shutdownAfterJobFinishes"] is True
    assert (JOB["backoffLimit"], JOB["ttlSecondsAfterFinished"]) == (3, 600)


def test_the_job_runs_a_valid_configuration_that_fits_the_cluster():
    program, command, recipe, *overrides = shlex.split(JOB["entrypoint"])
    assert (program, command) == ("treelora", "run")
    config = load_config(recipe_path(recipe), overrides)
    mount = RAY_PODS["RayJob-head"]["spec"]["containers"][0]["volumeMounts"][0]["mountPath"]
    assert config.name == "trace"  # the same at each retry: the run goes on
    assert config.output_dir.startswith(f"{mount}/")
    assert config.stream.path.startswith(f"{mount}/")
    (group,) = CLUSTER["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    a_pod = int(limits["nvidia.com/gpu"]) // config.cluster.gpus_per_worker
    assert a_pod * config.cluster.cpus_per_worker <= int(limits["cpu"])
    assert config.cluster.workers <= a_pod * group["maxReplicas"]


def test_autoscaling_bounds_and_idle_timeout():
    (group,) = CLUSTER["workerGroupSpecs"]
    assert CLUSTER["enableInTreeAutoscaling"] is True
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (0, 0, 2)
    aws = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert CLUSTER["autoscalerOptions"]["idleTimeoutSeconds"] == 60 * aws["idle_timeout_minutes"]
    assert group["maxReplicas"] == aws["max_workers"]


def test_only_workers_have_gpus():
    with_gpu = {n for n, pod in PODS.items() if "nvidia.com/gpu" in pod["spec"]["containers"][0]["resources"]["limits"]}
    assert with_gpu == {"RayCluster-gpu", "RayJob-gpu"}


@pytest.mark.parametrize("name", PODS)
def test_every_pod_is_confined(name):
    spec = PODS[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert (spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]) == (1000, 100)
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    # the head's autoscaler is the only one that talks to the API server
    assert spec.get("automountServiceAccountToken", True) is name.endswith("-head")
    for container in [*spec["containers"], CLUSTER["autoscalerOptions"]]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def test_ray_pods_have_token_shared_folder_and_the_operators_probes():
    assert CLUSTER["authOptions"] == {"mode": "token"}
    claim = MANIFESTS["PersistentVolumeClaim-treelora-shared"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in RAY_PODS.values():
        (container,) = pod["spec"]["containers"]
        assert not {"livenessProbe", "readinessProbe"} & set(container)
        assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/mnt/shared"}]
        (volume,) = pod["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_no_secret_is_written_down():
    for pod in PODS.values():
        for variable in pod["spec"]["containers"][0].get("env", []):
            secret = re.search("TOKEN|PASSWORD|SECRET|_KEY", variable["name"])
            assert ("valueFrom" if secret else "value") in variable, variable["name"]


def test_only_pods_of_this_project_reach_each_other():
    policy = MANIFESTS["NetworkPolicy-treelora"]["spec"]
    assert policy["podSelector"] == {"matchLabels": PART}
    assert policy["policyTypes"] == ["Ingress"]
    for pod in PODS.values():
        assert PART.items() <= pod["metadata"]["labels"].items()
    ours, operator = policy["ingress"]
    assert ours == {"from": [{"podSelector": {"matchLabels": PART}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    services = [CLUSTER["headGroupSpec"]["serviceType"], MANIFESTS["Service-treelora-mlflow"]["spec"]["type"]]
    assert services == ["ClusterIP", "ClusterIP"]


def test_workers_find_mlflow_and_mlflow_lets_them_in():
    service = MANIFESTS["Service-treelora-mlflow"]
    host = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    (container,) = PODS["mlflow"]["spec"]["containers"]
    options = dict(part.split("=", 1) for part in container["command"][2:])
    assert host in options["--allowed-hosts"].split(",")
    assert "*" not in options["--allowed-hosts"]
    script = (ROOT / "jobs" / "mlflow-server.sh").read_text()  # which a test runs
    assert set(options) == set(re.findall(r"(--[a-z-]+) \"", script)) | {"--workers"}
    assert service["spec"]["selector"].items() <= PODS["mlflow"]["metadata"]["labels"].items()
    assert {"name": "MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "value": "false"} in container["env"]
    for pod in RAY_PODS.values():
        assert {"name": "MLFLOW_TRACKING_URI", "value": f"http://{host}"} in pod["spec"]["containers"][0]["env"]


def test_one_image_at_the_versions_of_the_constraints():
    assert {pod["spec"]["containers"][0]["image"] for pod in PODS.values()} == {"registry.example.com/treelora:0.1.0"}
    assert CLUSTER["rayVersion"] == constraint("ray")
    lines = (FOLDER / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    assert f"FROM rayproject/ray:{constraint('ray')}-py311-gpu" in lines
    (run,) = (line for line in lines if line.startswith("RUN "))
    assert run.count("pip install ") == run.count("-c constraints.txt ") == 2
    assert not [line for line in lines if line.startswith("USER")]  # stays the base image's `ray`


def test_the_image_takes_what_it_needs_and_nothing_else():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    taken = [source for line in lines if line.startswith("COPY ") for source in line.split()[2:-1]]
    assert [source for source in taken if not (ROOT / source).exists()] == []
    ignore = [line for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] != "#"]
    assert ignore[0] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == set(taken)
