"""The servers and the balancers of the test, as processes."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from client import KEY, send

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy/loadbalancer"
DRAIN_DELAY = 5


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


async def until(what, condition, seconds=60):
    for _ in range(seconds * 10):
        if await condition():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"never came true: {what}")


class Server:
    """`tinyllava serve` on the embedded model, which can be started again on the same port."""

    def __init__(self, port, directory):
        self.port, self.log, self.process = port, directory / f"server-{port}.log", None

    def start(self):
        command = [
            ROOT / "target/debug/tinyllava", "serve", "--port", str(self.port), "--threads", "1", "--api-key", KEY,
            "--log-format", "json", "--drain-delay", str(DRAIN_DELAY), "--drain-timeout", "60",
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    async def until_ready(self):
        await until(f"server {self.port} is ready", self.is_ready)

    async def is_ready(self):
        assert self.process.poll() is None, f"ended with {self.process.poll()}: {self.last_lines()}"
        try:
            return (await send(self.port, "GET", "/ready")).status == 200
        except ConnectionError:
            return False

    def signal(self, number):
        self.process.send_signal(number)

    async def stop(self):
        """As a service manager does it; the server must end by itself and with success."""
        self.signal(signal.SIGTERM)
        code = await asyncio.to_thread(self.process.wait, 90)
        assert code == 0, f"ended with {code}: {self.last_lines()}"

    def finished(self):
        """Ids of the requests it has answered, as its log says."""
        # The end of a line may not be written yet, and a killed server never writes it.
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]
        return {line["span"]["id"] for line in lines if line.get("message") == "finished"}

    def last_lines(self):
        return "\n".join(self.log.read_text().splitlines()[-5:])


class Balancer:
    """What both have in common: a port, servers in the environment, a process in the foreground."""

    def __init__(self, servers):
        self.directory = Path(tempfile.mkdtemp(prefix="balancer-"))
        self.port, self.operator_port = free_ports(2)
        addresses = {f"TINYLLAVA_SERVER_{i + 1}": f"127.0.0.1:{each.port}" for i, each in enumerate(servers)}
        self.environment = os.environ | addresses | {"TINYLLAVA_LISTEN": f"127.0.0.1:{self.port}"}
        self.process = None

    async def start(self):
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, env=self.environment)
        await until("the balancer passes requests on", self.passes_on)

    async def passes_on(self):
        assert self.process.poll() is None, (self.directory / "log").read_text()
        try:
            return (await send(self.port, "GET", "/ready")).status == 200
        except ConnectionError:
            return False


class HAProxy(Balancer):
    NAME = "haproxy"

    def command(self):
        self.environment["TINYLLAVA_STATS"] = f"127.0.0.1:{self.operator_port}"
        return ["haproxy", "-db", "-f", DEPLOY / "haproxy.cfg"]

    async def states(self):
        """What it thinks of each server."""
        csv = (await send(self.operator_port, "GET", "/stats;csv")).body.decode().splitlines()
        rows = [row.split(",") for row in csv]
        status = rows[0].index("status")
        return {row[1]: row[status] for row in rows if row[0] == "by_load" and row[1].startswith("s")}


class Nginx(Balancer):
    NAME = "nginx"

    def command(self):
        self.environment |= {"NGINX_TEMP_DIR": self.directory, "NGINX_ACCESS_LOG": self.directory / "access.log"}
        names = [name for name in self.environment if name.startswith(("TINYLLAVA_", "NGINX_"))]
        template = (DEPLOY / "nginx.conf.template").read_bytes()
        filled = subprocess.run(
            ["envsubst", " ".join(f"${name}" for name in names)], input=template, env=self.environment,
            stdout=subprocess.PIPE, check=True,
        )
        # Started by root, its workers are somebody else.
        self.directory.chmod(0o755)
        (self.directory / "nginx.conf").write_bytes(filled.stdout)
        foreground = f"daemon off; pid {self.directory}/pid;"
        # On Debian only root has the directory on its path.
        self.environment["PATH"] += ":/usr/sbin"
        return ["/usr/bin/env", "nginx", "-e", "stderr", "-c", self.directory / "nginx.conf", "-g", foreground]
