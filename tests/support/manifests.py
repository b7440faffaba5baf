"""The Kubernetes manifests of `jobs/kubernetes`, and schemas to hold against them.

`python -m tests.support.manifests CRD.yaml ...` checks them against CRDs, such as a newer KubeRay's
(`kubectl get crd rayjobs.ray.io rayclusters.ray.io -o yaml`, or `helm show crds kuberay/kuberay-operator`).
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "jobs" / "kubernetes"


def documents(text: str) -> list[dict[str, Any]]:
    """The objects in a YAML text; a `List` counts as its items."""
    found = [document for document in yaml.safe_load_all(text) if document]
    return [item for document in found for item in document.get("items", [document])]


def manifests() -> list[dict[str, Any]]:
    return [manifest for path in sorted(FOLDER.glob("*.yaml")) for manifest in documents(path.read_text())]


def kind_of(manifest: dict[str, Any]) -> str:
    return f"{manifest['apiVersion']}/{manifest['kind']}"


def closed(schema: Any) -> Any:
    """The schema, with fields that it does not name refused, as `kubectl apply` refuses them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        strict.setdefault("additionalProperties", False)
    return strict


def kept_schemas() -> dict[str, dict[str, Any]]:
    """By kind: what this folder keeps of the schemas."""
    kept = closed(yaml.safe_load(Path(__file__).with_name("kubernetes_schema.yaml").read_text()))
    return {kind: {"$ref": f"#/kinds/{kind.replace('/', '~1')}", **kept} for kind in kept["kinds"]}


def crd_schemas(text: str) -> dict[str, dict[str, Any]]:
    """By kind: the schemas of custom resource definitions."""
    schemas = {}
    for crd in documents(text):
        spec = crd["spec"]
        for version in spec["versions"]:
            schema = closed(version["schema"]["openAPIV3Schema"])
            # the server adds what it does not let a CRD define
            schema["properties"]["metadata"] = {"type": "object"}
            schemas[f"{spec['group']}/{version['name']}/{spec['names']['kind']}"] = schema
    return schemas


def faults(manifest: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """What the schema has against a manifest, each with its place."""
    for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest):
        yield f"{error.json_path}: {error.message}"


def main(paths: list[str]) -> int:
    checked, found = 0, []
    for path in paths:
        schemas = crd_schemas(Path(path).read_text())
        for manifest in manifests():
            if kind_of(manifest) in schemas:
                checked += 1
                found += [f"{kind_of(manifest)}: {fault}" for fault in faults(manifest, schemas[kind_of(manifest)])]
    print("\n".join(found) if found else f"{checked} manifests agree")
    return bool(found) or not checked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
