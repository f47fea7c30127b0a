"""The project's own rules, checked by their tools: style, types, layers, what a hook loads, paths."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
MODULES = sorted((TOP / "vnet_lock").rglob("*.py"))
SCRIPTS = sysconfig.get_path("scripts")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "command",
    [
        "ruff check vnet_lock tests",
        "ruff format --check vnet_lock tests",
        "mypy --strict vnet_lock",
        "lint-imports --config setup.cfg --no-cache",
    ],
)
def test_tool_finds_nothing(command: str) -> None:
    program, *arguments = command.split()
    done = subprocess.run(
        [f"{SCRIPTS}/{program}", *arguments], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"


def test_the_map_has_each_module_and_package_in_its_layer() -> None:
    config = configparser.ConfigParser()
    config.read(TOP / "setup.cfg")
    layers = config["importlinter:contract:layers"]["layers"].strip().splitlines()
    depth = {name: at for at, layer in enumerate(layers) for name in layer.split(" | ")}
    known = {path.relative_to(TOP / "vnet_lock").parts[0].removesuffix(".py") for path in MODULES}
    diagram = (TOP / "ARCHITECTURE.md").read_text().split("```")[1]
    shown = [word for word in re.findall(r"\w+", diagram) if word in known]
    assert {*shown} == known - {"__init__"}
    assert shown == sorted(shown, key=depth.__getitem__)


def test_what_a_hook_loads_has_no_heavy_library_in_it(tmp_path: Path) -> None:
    """Each costs more than all that the hook does: pyroute2 250 ms, libvirt 50, asyncio 40, filelock 30."""
    loaded = ["vnet_lock.claims", "vnet_lock.locks"]
    if (TOP / "vnet_lock/front/hook.py").exists():
        loaded += [f"vnet_lock.front.{name}" for name in ("hook", "network_hook", "companion")]
    code = (
        f"import sys, {', '.join(loaded)}\n"
        # With a guard taken, what is imported inside functions is loaded too.
        "from vnet_lock.settings import Settings\n"
        "with vnet_lock.claims.ClaimTable(Settings.under(sys.argv[1])).guarded(): pass\n"
        "heavy = {'pyroute2', 'libvirt', 'asyncio', 'lxml', 'argparse', 'subprocess'}\n"
        "heavy |= {'filelock', 'dataclasses', 'inspect'}\n"
        "print(*sorted(heavy & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []


# Where a path of the host begins; not the rest of one ("…/net/eth0/dev").
HOST_PATH = re.compile(r"(?<![\w./}>-])/(sys|run|dev|proc|etc)(?![\w-])")


def literals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Each string of a module but docstrings, with its line; what follows another part begins with ``}``."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    continued = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values[1:]
    } | {
        id(node.right)
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, "}" * (id(node) in continued) + node.value


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TOP)))
def test_paths_of_the_host_are_spelled_in_settings_alone(path: Path) -> None:
    found = [
        f"{path.relative_to(TOP)}:{line}: {text!r}"
        for line, text in literals(ast.parse(path.read_text()))
        if HOST_PATH.search(text)
    ]
    if path.name == "settings.py":
        assert found
    else:
        assert found == []


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("x = '/sys/class'", True),
        ("x = f'/proc/{pid}'", True),
        ("x = f'{y} see /etc/libvirt'", True),
        ("x = 'look in /run'", True),
        ("x = f'{net}/dev'", False),
        ("x = net + '/dev'", False),
        ("x = '/system'", False),
        ("'''About /sys.'''", False),
    ],
)
def test_the_search_for_paths_finds_paths(source: str, is_found: bool) -> None:
    assert any(HOST_PATH.search(text) for _, text in literals(ast.parse(source))) is is_found
