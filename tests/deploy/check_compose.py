"""Checks compose.yaml without an engine: check_compose.py TINYLLAVA FILE. Flags, files that are mounted, hardening, limits."""

import os
import subprocess
import sys

import yaml


def seconds(text):
    assert text.endswith("s"), text
    return int(text[:-1])


def check_server(tinyllava, server):
    run = subprocess.run([tinyllava, *server["command"], "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    drain = sum(int(arg.split("=")[1]) for arg in server["command"] if arg.startswith(("--drain-delay=", "--drain-timeout=")))
    assert seconds(server["stop_grace_period"]) >= drain + 10
    assert server["read_only"] is True and server["tmpfs"]
    assert server["healthcheck"]["test"][:2] == ["CMD", "/usr/local/bin/tinyllava"]


def main(tinyllava, file):
    with open(file) as text:
        compose = yaml.safe_load(text)
    services, volumes = compose["services"], compose["volumes"]
    assert set(services) == {"tinyllava", "prometheus", "grafana"}
    check_server(tinyllava, services["tinyllava"])
    folder = os.path.dirname(file)
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"] and service["restart"] == "unless-stopped", name
        # Nothing is open to the network by itself.
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert set(service.get("depends_on", {})) <= set(services), name
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert mount.endswith(":ro"), mount
                assert os.path.exists(os.path.join(folder, source)), f"{name} mounts {source}, which is not there"
            else:
                assert source in volumes, mount
    print(f"{file}: {len(services)} services")


if __name__ == "__main__":
    main(*sys.argv[1:])
