"""A load run from nothing: `codeyard up` with the simulated engine on a free port, a load tool, a summary.

    python loadtest/run.py locust|jmeter [--users 20] [--seconds 30]

Everything runs on this machine, on an embedded file in a temporary folder; the simulated engine answers
as a GPU of its latency table would, so what is measured is the path around it. Reports go to
loadtest/results/. The exit status is the tool's: not 0 if a job failed. `make load-locust` calls this.
"""

import argparse
import contextlib
import csv
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).parent
RESULTS = HERE / "results"
READY_S = 60.0
STOP_S = 30.0
END_S = 90.0  # for a tool to finish what is under way when the time is up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tool", choices=["locust", "jmeter"])
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=30)
    options = parser.parse_args()
    if not (1 <= options.users <= 500 and 1 <= options.seconds <= 3_600):
        parser.error("1 to 500 users, 1 to 3600 seconds")
    run = {"locust": run_locust, "jmeter": run_jmeter}[options.tool]
    RESULTS.mkdir(exist_ok=True)
    with running_codeyard(RESULTS / "up.log") as url:
        print(f"{options.users} users for {options.seconds} s on {url}", flush=True)
        return run(url, options.users, options.seconds)


@contextlib.contextmanager
def running_codeyard(log: Path) -> Iterator[str]:
    """The URL of a `codeyard up` that serves; ended with the context."""
    with tempfile.TemporaryDirectory(prefix="codeyard-load-") as folder:
        file_url = f"sqlite:///{folder}/yard.db"
        process = subprocess.Popen(
            [sys.executable, "-m", "codeyard.cli.main", "up", "--engine", "simulated", "--port", "0"],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("CODEYARD_")},
                "CODEYARD_BROKER_URL": file_url,
                "CODEYARD_STORE_URL": file_url,
                "CODEYARD_LOG_LEVEL": "WARNING",
                "PYTHONUNBUFFERED": "1",
            },
            cwd=folder,  # no codeyard.yaml there
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with process:  # closes the pipe and waits
            try:
                yield _wait_ready(process, log)
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def run_locust(url: str, users: int, seconds: int) -> int:
    return subprocess.run(
        [
            *(sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py")),
            *("--headless", "--only-summary", "--host", url),
            *("--users", str(users), "--spawn-rate", str(max(1, users // 2))),
            *("--run-time", f"{seconds}s", "--stop-timeout", "60"),
            *("--csv", str(RESULTS / "locust"), "--html", str(RESULTS / "locust.html")),
        ],
        timeout=seconds + END_S,
        check=False,
    ).returncode


def run_jmeter(url: str, users: int, seconds: int) -> int:
    command = jmeter_command()
    if command is None:
        print("jmeter is not installed: apt-get install jmeter jmeter-http default-jre-headless", file=sys.stderr)
        return 1
    samples = RESULTS / "jmeter.csv"
    samples.unlink(missing_ok=True)  # JMeter would append
    where = urlsplit(url)
    properties = {
        "host": where.hostname,
        "port": where.port,
        "users": users,
        "seconds": seconds,
        "jmeter.save.saveservice.output_format": "csv",
        "jmeter.save.saveservice.print_field_names": "true",
        "jmeterengine.nongui.port": 0,  # no port for shutdown messages
    }
    ended = subprocess.run(
        [
            *(*command, "-n", "-t", str(HERE / "jmeter" / "codeyard.jmx")),
            *("-l", str(samples), "-j", str(RESULTS / "jmeter.log")),
            *(f"-J{name}={value}" for name, value in properties.items()),
        ],
        timeout=seconds + END_S,
        check=False,
    )
    return ended.returncode or print_samples(samples)


def jmeter_command() -> list[str] | None:
    """How JMeter starts on this machine: Debian's with the help it needs (jmeter/debian.bsh), or another."""
    debian, beanshell = Path("/usr/share/jmeter"), Path("/usr/share/java/bsh.jar")
    if (debian / "bin" / "ApacheJMeter.jar").exists() and beanshell.exists():
        jars = f"{debian}/bin/ApacheJMeter.jar:{debian}/lib/*:{debian}/lib/ext/*:{beanshell}"
        options = ["-Djava.awt.headless=true", f"-Djmeter.home={debian}", "-cp", jars]
        return ["java", *options, "bsh.Interpreter", str(HERE / "jmeter" / "debian.bsh")]
    program = shutil.which("jmeter")
    return [program] if program else None


def print_samples(samples: Path) -> int:
    """A row per label: count, failures, milliseconds. Returns 1 if a sample failed or there is none."""
    took_ms: dict[str, list[int]] = defaultdict(list)
    failed: dict[str, int] = defaultdict(int)
    if not samples.exists():
        print(f"JMeter took no sample; its log is {RESULTS / 'jmeter.log'}", file=sys.stderr)
        return 1
    with samples.open(newline="") as file:
        for row in csv.DictReader(file):
            took_ms[row["label"]].append(int(row["elapsed"]))
            failed[row["label"]] += row["success"] != "true"
    print(f"{'':32}{'count':>8}{'failed':>8}{'p50 ms':>8}{'p95 ms':>8}{'max ms':>8}")
    for label, values in sorted(took_ms.items()):
        p95 = statistics.quantiles(values, n=20)[-1] if len(values) > 1 else values[0]
        numbers = f"{len(values):>8}{failed[label]:>8}{statistics.median(values):>8.0f}{p95:>8.0f}{max(values):>8}"
        print(f"{label:32}{numbers}")
    print(f"samples: {samples}")
    return int(not took_ms or any(failed.values()))


def _wait_ready(process: "subprocess.Popen[str]", log: Path) -> str:
    """The gateway's URL, once the worker serves too. Its further output goes to `log`."""
    assert process.stdout is not None
    watchdog = threading.Timer(READY_S, process.kill)
    watchdog.start()
    url, serves, seen = "", False, []
    for line in process.stdout:
        seen.append(line)
        url = line.split()[1] if line.startswith("gateway ") else url
        serves = serves or line.startswith("worker ")
        if url and serves:
            break
    watchdog.cancel()
    if not (url and serves):
        raise SystemExit(f"codeyard up did not start within {READY_S:g} s:\n{''.join(seen)}")
    threading.Thread(target=_drain, args=(process.stdout, log, seen), daemon=True).start()
    return url


def _drain(lines: Iterator[str], log: Path, seen: list[str]) -> None:
    with log.open("w") as file:
        file.writelines(seen)
        for line in lines:
            file.write(line)
            file.flush()


if __name__ == "__main__":
    sys.exit(main())
