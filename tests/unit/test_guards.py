"""What must stay true of the code as a whole, however it grows: layout, imports, exports, tools not to use."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from codeyard.shared.telemetry import Metrics

ROOT = Path(__file__).parents[2]
ROOTS = [ROOT / name for name in ("shared", "producer", "worker")]
TESTS = ROOT / "tests"
HEAVY = {
    "torch",
    "transformers",
    "vllm",
    "fastapi",
    "starlette",
    "uvicorn",
    "grpc",
    "google",
    "numpy",
    "matplotlib",
    "locust",
}
LABELS = {"kind", "lane", "model", "outcome", "reason", "route", "status", "tier", "to"}

# Who may know whom. The commands put all of it together.
MAY_IMPORT = {
    "codeyard.shared": {"codeyard.shared"},
    "codeyard.producer": {"codeyard.shared", "codeyard.producer"},
    "codeyard.worker": {"codeyard.shared", "codeyard.worker"},
    "codeyard.cli": {"codeyard.shared", "codeyard.producer", "codeyard.worker", "codeyard.cli"},
}


@cache
def sources() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for root in ROOTS:
        for path in (root / "codeyard").rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    assert len(found) > 50
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[str]:
    """Every module named in an import statement, wherever in the file it stands."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_the_packages_know_only_whom_they_may() -> None:
    """A backend service installs the producer without the worker's world, and the other way round."""
    for name, path in sources().items():
        package = ".".join(name.split(".")[:2])
        for imported in imports(path):
            if imported.startswith("codeyard."):
                owner = ".".join(imported.split(".")[:2])
                assert owner in MAY_IMPORT[package], f"{path}: {package} imports {imported}"


def test_codeyard_is_a_namespace_over_three_roots() -> None:
    """An `__init__.py` in one of them would hide the others."""
    for root in ROOTS:
        assert not (root / "codeyard" / "__init__.py").exists(), root


def test_every_package_ships_its_types() -> None:
    """Without the marker a caller's type checker sees nothing but Any."""
    packages = {path for root in ROOTS for path in (root / "codeyard").iterdir() if any(path.glob("*.py"))}

    assert {path.name for path in packages} == {"shared", "producer", "worker", "cli"}
    for path in packages:
        assert (path / "py.typed").exists(), path


@pytest.mark.parametrize(
    "statement",
    [
        "import codeyard.producer",
        "import codeyard.producer.rpc",
        "from codeyard.producer import Client, AsyncClient",
        "import codeyard.cli.main, codeyard.cli.jobs",
        "import codeyard.shared.connect, codeyard.shared.settings",
    ],
)
def test_a_backend_service_gets_no_engine_and_no_web_framework(statement: str) -> None:
    """They cost seconds and gigabytes, and the base install does not bring them."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert not HEAVY & set(loaded.stdout.split())


def test_importing_the_package_loads_no_client_library() -> None:
    """A service on Redis needs no RabbitMQ client at import, and a command line starts at once."""
    code = "import codeyard.producer, codeyard.shared.connect, sys; print(*sys.modules)"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert not {"aio_pika", "pika", "redis"} & set(loaded.stdout.split())


def test_every_exported_name_is_there() -> None:
    """A name in `__all__`, or one the documentation promises, that cannot be imported."""
    promised = {"codeyard.producer": {"Client", "AsyncClient"}}
    for name, path in sources().items():
        listed: list[str] = next(
            (
                ast.literal_eval(node.value)
                for node in tree(path).body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            ),
            [],
        )
        for export in promised.get(name, set()) | set(listed):
            assert hasattr(importlib.import_module(name), export), f"{name} has no {export}"


def test_nothing_that_was_sent_can_become_code() -> None:
    """Messages, results and settings come from elsewhere: JSON and YAML's plain types, nothing that executes."""
    forbidden_modules = {"pickle", "cPickle", "cloudpickle", "dill", "jsonpickle", "marshal", "shelve"}
    forbidden_calls = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "torch.load"}
    for path in [*sources().values(), *(ROOT / "loadtest").rglob("*.py")]:
        assert not forbidden_modules & {name.partition(".")[0] for name in imports(path)}, path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                assert called(node) not in forbidden_calls, f"{path}:{node.lineno}: {called(node)}"


def test_no_shell_is_given_a_command_line() -> None:
    """Names of models and files come from outside."""
    for path in [*sources().values(), *(ROOT / "loadtest").rglob("*.py")]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                assert called(node) not in {"os.system", "os.popen", "asyncio.create_subprocess_shell"}, path
                shell = [word.value for word in node.keywords if word.arg == "shell"]
                assert not any(ast.unparse(value) == "True" for value in shell), f"{path}:{node.lineno}"


def test_every_task_has_a_parent() -> None:
    """A task started with a bare `asyncio.create_task(...)` statement can fail unseen and be collected."""
    for path in sources().values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                what = called(node.value)
                assert what not in {"asyncio.create_task", "asyncio.ensure_future", "loop.create_task"}, (
                    f"{path}:{node.lineno}: {what} without an owner"
                )


def test_metrics_are_ours_by_name_and_their_labels_are_few() -> None:
    """A label whose values are ids would be a new series per job, until the server has no memory left."""
    metrics = Metrics(CollectorRegistry())

    assert metrics.declared
    for declared in metrics.declared:
        assert re.fullmatch(r"codeyard_[a-z_]+", declared.name), declared
        assert set(declared.labels) <= LABELS, declared
        assert declared.meaning, declared
        if declared.kind == "counter":
            assert declared.name.endswith("_total"), declared
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb)(_|$)", declared.name), f"{declared}: base units"


def test_metrics_are_declared_in_one_place() -> None:
    """docs/metrics.md is checked against that place."""
    makers = {"Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"}
    for name, path in sources().items():
        if name != "codeyard.shared.telemetry":
            made = {imported for imported in imports(path) if imported.startswith("prometheus_client.")}
            calls = {called(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
            named = {imported.rpartition(".")[2] for imported in made} & makers
            assert not named & calls, f"{path} makes a metric"


def test_no_test_waits_by_sleeping() -> None:
    """A sleep is too short on a busy machine and too long on every other. `sleep(0)`, a turn of the loop, is
    none; and helpers may ask another process again and again, in a loop that a deadline ends."""
    for path in TESTS.rglob("*.py"):
        polls = {
            id(inner)
            for node in ast.walk(tree(path))
            if isinstance(node, ast.AsyncWith | ast.With) and any("timeout" in ast.unparse(item) for item in node.items)
            for loop in ast.walk(node)
            if isinstance(loop, ast.While)
            for inner in ast.walk(loop)
        }
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module in {"time", "asyncio"}:
                assert "sleep" not in {alias.name for alias in node.names}, f"{path}:{node.lineno}: name its module"
            if isinstance(node, ast.Call) and called(node) in {"time.sleep", "asyncio.sleep", "anyio.sleep"}:
                turn = ast.unparse(node.args[0]) == "0"
                helper = path.is_relative_to(TESTS / "support") and id(node) in polls
                assert turn or helper, f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_every_test_says_why_it_is_there() -> None:
    """The name says what must hold, the docstring the reason."""
    for path in TESTS.rglob("test_*.py"):
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                assert node.name.count("_") >= 3, f"{path}:{node.lineno}: {node.name} is no sentence"
                assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no reason"
