"""Real servers from the machine's own binaries, private to a drill or a test, started and stopped as it pleases.

Each listens on 127.0.0.1 on a free port of its own and keeps everything it writes in one folder, so a
server that already runs on the machine is never met. Port and folder stay the same over kill and restart:
clients find it again with what it had made durable. All of them die with the process that
started them (guardian.py). Called by: cli.drill, tests.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, ClassVar, Self

from codeyard.cli.drill import guardian
from codeyard.cli.drill.probes import amqp_answers, redis_answers
from codeyard.shared.errors import FleetError

_POLL_S = 0.05
ROOT_VARIABLE = "CODEYARD_TEST_SERVERS_ROOT"
"""Names the folder of another Debian, whose programs are run by chroot in place of this machine's: other versions
of both servers. Only root can."""
_ENTER = """
mkdir -p "$1$2" && mount -t proc proc "$1/proc" && mount --bind "$2" "$1$2" || exit 1
root=$1; shift 2; exec chroot "$root" "$@"
"""  # in a mount namespace of its own, so that nothing stays mounted; the server's folder has the same path inside
_DEBIAN_RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # /usr/sbin has a wrapper that fixes user and paths


class ServerFailed(FleetError):
    """A server of ours did not start; carries the end of its log."""


class Guarded:
    """One child process that cannot outlive us, with its output in a file."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", str(guardian.__file__), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,  # Ctrl-C is for us, not for our servers
            )
        first_line = _stream(self._guardian.stdout).readline()
        if not first_line.strip():
            self.kill()
            raise ServerFailed(f"{command[0]} could not be run:\n{self.log_tail()}")
        self.pid = int(first_line)

    @property
    def running(self) -> bool:
        return self._guardian.poll() is None

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within `timeout_s`."""
        try:
            self._guardian.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL, at once, as a power cut would."""
        with contextlib.suppress(OSError):
            _stream(self._guardian.stdin).close()
        self._guardian.wait(10)
        _stream(self._guardian.stdout).close()

    def stop(self, grace_s: float) -> None:
        """SIGTERM; SIGKILL if that takes longer than `grace_s`."""
        with contextlib.suppress(ProcessLookupError):
            self._guardian.send_signal(signal.SIGTERM)
        self.wait(grace_s)
        self.kill()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def log_tail(self, lines: int = 30) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return "(no log)"


class _Server:
    """What both servers share: a port and a folder that stay, processes that come and go."""

    name: ClassVar[str]
    ready_within_s: ClassVar[float]
    stop_within_s: ClassVar[float]

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.host = "127.0.0.1"
        self.port = free_port()
        self._process: Guarded | None = None

    @classmethod
    def available(cls) -> bool:
        """Whether this machine has the server's program."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        raise NotImplementedError

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} is not running"
        return self._process.pid

    def start(self) -> Self:
        """Run it and return when it answers. Raises ServerFailed with the end of its log."""
        assert self._process is None, f"{self.name} is running"
        self._process = self._launch()
        deadline = time.monotonic() + self.ready_within_s
        while not self._answers():
            if self._process.wait(_POLL_S) or time.monotonic() > deadline:
                tail = self._process.log_tail()
                how = "did not answer in time" if self._process.running else "ended"
                self.kill()
                raise ServerFailed(f"{self.name} on port {self.port} {how}; its log ends:\n{tail}")
        return self

    def kill(self) -> None:
        """SIGKILL: what it had not made durable is lost."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def stop(self) -> None:
        """An orderly end."""
        if self._process is not None:
            self._process.stop(self.stop_within_s)
            self._process = None

    def restart(self) -> Self:
        """Kill and start again on the same port with the same data."""
        self.kill()
        return self.start()

    def freeze(self) -> None:
        """SIGSTOP: links stay open and nothing answers."""
        assert self._process is not None
        self._process.send(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _launch(self) -> Guarded:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError


class RedisServer(_Server):
    """redis-server as our configurations run it: every write is on disk before its reply, nothing is evicted."""

    name = "redis-server"
    ready_within_s = 20.0
    stop_within_s = 5.0

    @classmethod
    def available(cls) -> bool:
        return found(cls.name) is not None

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def _launch(self) -> Guarded:
        options = {
            "port": str(self.port),
            "bind": self.host,
            "dir": str(self.directory),
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        command = [self.name, *(word for name, value in options.items() for word in (f"--{name}", value))]
        log = self.directory / "redis.log"
        return Guarded(as_run(command, self.directory), env={"PATH": path()}, cwd=self.directory, log=log)

    def _answers(self) -> bool:
        return redis_answers(self.host, self.port)


class RabbitServer(_Server):
    """A one-node RabbitMQ with its own name, cookie, port mapper (epmd), database and plugin list.

    The Erlang runtime would leave an epmd behind as a daemon, so one runs here first, in the foreground.
    """

    name = "rabbitmq-server"
    ready_within_s = 60.0
    stop_within_s = 20.0

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._epmd_port = free_port()
        self._dist_port = free_port()
        self._epmd: Guarded | None = None

    @classmethod
    def available(cls) -> bool:
        return cls._program() is not None and found("epmd") is not None

    @classmethod
    def _program(cls) -> str | None:
        return found(str(_DEBIAN_RABBITMQ)) or found(cls.name)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{self.host}:{self.port}/"

    @property
    def node(self) -> str:
        """Its Erlang name, by which rabbitmqctl finds it."""
        return f"own{self.port}@localhost"

    def control_environment(self) -> dict[str, str]:
        """What rabbitmqctl needs to reach it: cookie and port mapper."""
        names = ("PATH", "LANG", "HOME", "ERL_EPMD_PORT", "ERL_EPMD_ADDRESS", "RABBITMQ_CONF_ENV_FILE")
        return {name: value for name, value in self._environment().items() if name in names}

    def kill(self) -> None:
        super().kill()
        self._end_epmd()

    def stop(self) -> None:
        super().stop()
        self._end_epmd()

    def _end_epmd(self) -> None:
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd = None

    def _launch(self) -> Guarded:
        env = self._environment()
        self._epmd = self._own_epmd()
        program = self._program()
        assert program is not None
        return Guarded(
            as_run([program], self.directory), env=env, cwd=self.directory, log=self.directory / "rabbitmq.log"
        )

    def _own_epmd(self) -> Guarded | None:
        return start_epmd(self.directory, self._epmd_port)

    def _environment(self) -> dict[str, str]:
        """Every place RabbitMQ would otherwise share with one that the machine runs."""
        here = self.directory
        (here / "rabbitmq.conf").write_text(self._configuration())
        (here / "enabled_plugins").write_text("[].\n")
        (here / "rabbitmq-env.conf").write_text("")
        return {
            "PATH": path(),
            "LANG": "C.UTF-8",
            "HOME": str(here),  # the Erlang cookie is made here
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": self.host,
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_CONF_ENV_FILE": str(here / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(here / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(here / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(here / "data"),
            "RABBITMQ_LOG_BASE": str(here / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(here / "pid"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(here / "generated"),
            "RABBITMQ_SCHEMA_DIR": str(here / "schema"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RUNNING_UNDER_SYSTEMD": "true",  # the start script then becomes the server instead of its parent
        }

    def _configuration(self) -> str:
        return (
            f"listeners.tcp.1 = {self.host}:{self.port}\n"
            "log.console = true\n"
            "log.console.level = info\n"
            "raft.wal_max_size_bytes = 33554432\n"  # it is allocated in full at start; the default is 512 MiB
            "disk_free_limit.absolute = 64MB\n"
        )

    def _answers(self) -> bool:
        return _listens(self.host, self.port) and amqp_answers(self.url)


def start_epmd(directory: Path, port: int) -> Guarded:
    """Erlang's port mapper, answering. Raises ServerFailed."""
    command = as_run(["epmd", "-port", str(port), "-address", "127.0.0.1"], directory)
    epmd = Guarded(command, env={"PATH": path(), "LANG": "C.UTF-8"}, cwd=directory, log=directory / "epmd.log")
    deadline = time.monotonic() + 10
    while not _listens("127.0.0.1", port):
        if epmd.wait(_POLL_S) or time.monotonic() > deadline:
            epmd.kill()
            raise ServerFailed(f"epmd on port {port} did not start:\n{epmd.log_tail()}")
    return epmd


def servers_root() -> Path | None:
    """Where the servers' programs come from; None: this machine."""
    named = os.environ.get(ROOT_VARIABLE)
    return Path(named) if named else None


def found(program: str) -> str | None:
    """The program's path as the server sees it, or None where there is none."""
    root = servers_root()
    if root is None:
        return shutil.which(program)
    inside = (program,) if program.startswith("/") else tuple(f"{folder}/{program}" for folder in path().split(":"))
    return next((one for one in inside if (root / one.lstrip("/")).exists()), None)


def path() -> str:
    """PATH for the servers."""
    return os.environ["PATH"] if servers_root() is None else "/usr/sbin:/usr/bin:/sbin:/bin"


def as_run(command: Sequence[str], directory: Path) -> list[str]:
    """`command` for a server that keeps its files in `directory`: as it is, or inside the other Debian."""
    root = servers_root()
    if root is None:
        return list(command)
    return [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "--",
        "sh",
        "-c",
        _ENTER,
        "sh",
        str(root),
        str(directory),
        *command,
    ]


_taken_ports: set[int] = set()
_taking = threading.Lock()


def free_port() -> int:
    """A port nobody listens on, below the range that outgoing connections are given, so that none of them
    sits on it while a server is restarted."""
    with _taking:
        for port in random.sample(range(20_000, 32_000), 200):
            if port not in _taken_ports and _can_bind(port):
                _taken_ports.add(port)
                return port
    raise ServerFailed("no free port between 20000 and 32000")


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
