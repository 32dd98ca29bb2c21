"""Checks what `kubectl kustomize` rendered: check_manifests.py TINYLLAVA OVERLAY.yaml…

Kinds of Kubernetes against its own schemas, strictly; custom ones against custom_resources.py; then what no schema knows:
names that must match, flags that must exist, and the restricted pod security standard.
"""

import re
import subprocess
import sys

import jsonschema
import kubernetes_validate
import yaml

from custom_resources import PICKER_CONFIG, SPECS

# Debian's kubectl is old, the cluster is not.
KUBERNETES = "1.33"


def check_schema(found):
    key = (found["apiVersion"], found["kind"])
    if key in SPECS:
        jsonschema.validate(found["spec"], SPECS[key])
    else:
        kubernetes_validate.validate(found, KUBERNETES, strict=True)


def check_flags(tinyllava, container):
    """The binary itself reads the flags; --help keeps it from doing what they say."""
    args = container.get("args", [])
    run = subprocess.run([tinyllava, *args, "--help"], capture_output=True, text=True)
    assert run.returncode == 0, f"{args}: {run.stderr}"


def check_restricted(pod):
    """The fields of the restricted pod security standard."""
    shared = pod["securityContext"]
    assert shared["runAsNonRoot"] and shared["seccompProfile"]["type"] == "RuntimeDefault"
    for container in pod.get("initContainers", []) + pod["containers"]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
    assert not any("hostPath" in volume for volume in pod.get("volumes", []))


def check_pods(tinyllava, deployment):
    pod = deployment["spec"]["template"]["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    check_restricted(pod)
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod.get("initContainers", []) + pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        if "tinyllava-server" in container["image"]:
            check_flags(tinyllava, container)
    for volume in pod["volumes"]:
        # kustomize's `images:` does not reach these.
        reference = volume.get("image", {}).get("reference", "registry.example.com/name:tag")
        assert re.fullmatch(r"[^/:]+[.:][^/]+/[^:@]+(:[^:@/]+|@sha256:[0-9a-f]{64})", reference), f"no registry or tag: {reference}"
    server = pod["containers"][0]
    if server["name"] != "server":
        return
    delay, drain = (
        next(int(arg.split("=")[1]) for arg in server["args"] if arg.startswith(flag))
        for flag in ("--drain-delay=", "--drain-timeout=")
    )
    # The server waits by itself: a sleep before SIGTERM would come on top.
    assert "lifecycle" not in server
    grace = pod["terminationGracePeriodSeconds"]
    assert grace >= delay + drain + 10, f"grace period {grace} < {delay} + {drain} + 10"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert server[probe]["httpGet"]["port"] == "http"


def check_references(objects):
    names = {(found["kind"], found["metadata"]["name"]) for found in objects}
    by_kind = {}
    for found in objects:
        by_kind.setdefault(found["kind"], []).append(found)
    ports = {port["name"] for found in by_kind["Deployment"]
             for container in found["spec"]["template"]["spec"]["containers"] for port in container["ports"]}
    service_ports = {(found["metadata"]["name"], port["port"]) for found in by_kind["Service"] for port in found["spec"]["ports"]}
    port_names = {port["name"] for found in by_kind["Service"] for port in found["spec"]["ports"]}
    for found in by_kind["Service"]:
        assert {port["targetPort"] for port in found["spec"]["ports"]} <= ports
    for found in by_kind.get("HTTPRoute", []):
        for rule in found["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                assert (backend.get("kind", "Service"), backend["name"]) in names, backend
                assert "port" not in backend or (backend["name"], backend["port"]) in service_ports, backend
    for found in by_kind.get("InferencePool", []):
        picker = found["spec"]["endpointPickerRef"]
        assert (picker["name"], picker["port"]["number"]) in service_ports
    for found in by_kind.get("ServiceMonitor", []):
        assert found["spec"]["endpoints"][0]["port"] in port_names
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        for found in by_kind.get(kind, []):
            assert ("Deployment", found["spec"]["scaleTargetRef"]["name"]) in names
    scalers = len(by_kind.get("HorizontalPodAutoscaler", [])) + len(by_kind.get("ScaledObject", []))
    assert scalers == 1, f"{scalers} autoscalers would fight over one Deployment"


def check_picker(objects):
    for found in objects:
        text = found.get("data", {}).get("epp-config.yaml") if found["kind"] == "ConfigMap" else None
        if text is None:
            continue
        config = yaml.safe_load(text)
        jsonschema.validate(config, PICKER_CONFIG)
        declared = {plugin.get("name", plugin["type"]) for plugin in config["plugins"]}
        used = {plugin["pluginRef"] for profile in config["schedulingProfiles"] for plugin in profile["plugins"]}
        for source in config["dataLayer"]["sources"]:
            used |= {source["pluginRef"], *(extractor["pluginRef"] for extractor in source["extractors"])}
        assert used <= declared, used - declared
        scorers = {name for name in used if name.endswith("-scorer")}
        assert scorers == {"queue-scorer", "kv-cache-utilization-scorer", "prefix-cache-scorer", "mm-embeddings-cache-scorer"}


def main(tinyllava, files):
    for file in files:
        with open(file) as text:
            objects = [found for found in yaml.safe_load_all(text) if found]
        for found in objects:
            where = f"{file}: {found['kind']} {found['metadata']['name']}"
            try:
                check_schema(found)
                if found["kind"] == "Deployment":
                    check_pods(tinyllava, found)
            except Exception as error:
                sys.exit(f"{where}: {error}")
        check_references(objects)
        check_picker(objects)
        custom = sum((found["apiVersion"], found["kind"]) in SPECS for found in objects)
        print(f"{file}: {len(objects) - custom} objects by Kubernetes' schemas, {custom} custom ones by ours")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
