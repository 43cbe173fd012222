"""The rules for imports of ARCHITECTURE.md, checked in the sources."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
BEHIND = {
    "docker": {"driver.engine"},
    "requests": {"driver.engine"},
    "gunicorn": {"plugin.server"},
    "flask": {"plugin.app", "plugin.admin", "plugin.page_app"},
    "werkzeug": {"plugin.app", "plugin.admin", "plugin.page_app"},
    "sqlite3": {"driver.store"},
    "prometheus_client": {"plugin.metrics"},
    "pyverbs": {"dataplane.router.devices"},
    "yaml": {"plugin.cli.stack_file"},
    "cryptography": {"dataplane.router.shared_key", "driver.key_proof"},
}
"""Third-party libraries, and the only modules that may import them."""


def _name(path: Path) -> str:
    return ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    _name(path): ast.parse(path.read_text())
    for folder in ("dataplane", "driver", "plugin")
    for path in sorted((TOP / folder).rglob("*.py"))
}


def imports(module: str) -> set[str]:
    """Everything that a module imports, anywhere: modules, and names in packages that may be
    modules.
    """
    found: set[str] = set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reached(module: str) -> set[str]:
    """All modules, own and others', that are loaded with this one."""
    todo, found = [module], set()
    while todo:
        current = todo.pop()
        if current in found:
            continue
        found.add(current)
        if current in SOURCES:
            todo += imports(current)
    return found


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("driver")])
def test_the_driver_knows_nothing_of_the_plugin(module: str) -> None:
    """Imports go in one direction, from plugin to driver."""
    assert not [name for name in imports(module) if name.partition(".")[0] == "plugin"]


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("dataplane")])
def test_the_dataplane_knows_nothing_of_the_others(module: str) -> None:
    """The router is a process of its own: it contains nothing of driver or plugin."""
    assert not [
        name for name in imports(module) if name.partition(".")[0] in ("plugin", "driver", "docker")
    ]


@pytest.mark.parametrize("module", [name for name in SOURCES if not name.startswith("dataplane")])
def test_the_router_is_spoken_to(module: str) -> None:
    """Driver and plugin use the router only through its messages, not through its parts."""
    known = {name for name in SOURCES if name.startswith("dataplane")} & imports(module)
    said = {"dataplane", "dataplane.router_client", "dataplane.control", "dataplane.errors"}
    # The driver attaches eBPF programs; their parts stay behind the names of the package.
    assert known <= said | {"dataplane.threads", "dataplane.nlmsg", "dataplane.ebpf"}


def _used(module: str) -> set[str]:
    """The own modules that a module uses, including those that only its type annotations name."""
    used = imports(module) & set(SOURCES)
    # `from package import module` uses the module, not the package's own names.
    return used - {name.rpartition(".")[0] for name in used} - {module}


def test_no_import_circle() -> None:
    """There is no circle of modules, at run time or for types, so they can be read bottom up."""
    graph = {module: _used(module) for module in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("library", BEHIND)
def test_libraries_stay_behind_their_module(library: str) -> None:
    """Only one place uses a third-party library, and translates its errors."""
    users = {
        module
        for module in SOURCES
        if any(name.partition(".")[0] == library for name in imports(module))
    }
    assert users == BEHIND[library]


@pytest.mark.parametrize("module", ["plugin.app", "driver.driver", "driver.recovery"])
def test_no_call_can_ask_docker(module: str) -> None:
    """The code that serves Docker's calls cannot reach Docker's API, which does not answer then
    (libnetwork#414).
    """
    assert not reached(module) & {"docker", "driver.engine", "driver.sync", "http.client"}


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_says_what_it_is(module: str) -> None:
    """Each module begins with a docstring."""
    assert ast.get_docstring(SOURCES[module])


@pytest.mark.parametrize(
    "module", ["driver.vip", "driver.kernel.forwarding_check", "driver.kernel.flows"]
)
def test_what_works_in_containers_is_without_libraries_that_parse(module: str) -> None:
    """Code that runs in a container's namespace does not decode by libnftables or pyroute2, because
    the container may have written the data.
    """
    found = reached(module)
    assert not {each for each in found if each.startswith("pyroute2")}
    assert "driver.kernel.nft" not in found


def _imported(folder: str) -> set[str]:
    """The own top-level packages that the files of a folder import."""
    found: set[str] = set()
    for path in sorted((TOP / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found & {"plugin", "driver", "dataplane", "bench", "testbed", "tests"}


def test_nothing_imports_the_tests() -> None:
    """Tests are the top layer. Benchmarks and tests share the test bed, which knows neither."""
    assert not _imported("testbed") & {"tests", "bench"}
    assert "tests" not in _imported("bench")
    for folder in ("plugin", "driver", "dataplane"):
        assert not _imported(folder) & {"testbed", "tests", "bench"}
