"""The rules of the layout, read from the source: import directions, one home a library, size caps."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "carso_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own part, from levels below it, and from the ground.
LEVELS = ["cli", "workflows", "build", "defence", "part"]
GROUND = {
    "allocator",
    "batch_norm",
    "checksums",
    "compat",
    "distributed",
    "download",
    "errors",
    "home",
    "interruption",
    "launch",
    "meeting",
    "numerics",
    "precision",
    "randomness",
    "reporter",
    "whole_file",
}
PARTS = {"representation", "aggregation", "purifier", "classifiers", "data", "attacks"}
RECORDING = {"runs", "pictures", "reports"}

HOMES = {
    "typer": {"cli"},
    "rich": {"cli"},
    "yaml": {"recipe"},
    "safetensors": {"runs", "classifiers", "data"},
    "advertorch": {"attacks", "compat"},
    "pyautoattack": {"attacks", "compat"},
    "robustbench": {"classifiers", "compat"},
    "torchvision": {"classifiers", "data", "compat"},
    "timm": {"classifiers"},
    "sklearn": {"data"},
    "matplotlib": {"pictures"},
    "pydantic": {"recipe"},
    "onnxruntime": {"workflows"},
    "torch.distributed": {"distributed", "meeting"},
}


def part_of(module: Path) -> str:
    """First path component below the package: `attacks`, `build`, …"""
    return module.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(module: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(module.read_text())
    nodes: Iterator[ast.AST] = iter(tree.body) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def level(part: str) -> int:
    return LEVELS.index("part" if part in PARTS else part)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(module: Path) -> None:
    part = part_of(module)
    if part in {"__init__", "__main__"}:
        return
    for name in imports(module):
        if not name.startswith("carso_cli."):
            continue
        other = name.split(".")[1]
        if other == part or other in GROUND:
            continue
        if part in GROUND or part in RECORDING:
            assert other in GROUND | RECORDING, f"{part} imports {other}"
        elif part == "recipe":
            pytest.fail(f"recipe imports {other}")
        elif other == "recipe":
            assert part in {"cli", "workflows", "build"}, f"{part} reads recipes"
        elif other in RECORDING:
            assert part in {"cli", "workflows", "build"}, f"{part} writes run files"
        elif part in PARTS:
            pytest.fail(f"the part {part} imports {other}: parts are joined in build and defence")
        else:
            assert level(other) > level(part), f"{part} imports {other}, which is not below it"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_library_has_one_home(module: Path) -> None:
    for name in imports(module):
        for library in (name.split(".")[0], ".".join(name.split(".")[:2])):
            if library in HOMES:
                assert part_of(module) in HOMES[library], f"{library} is imported in {part_of(module)}"


@pytest.mark.parametrize("folder", ["recipe", "cli"])
def test_recipes_and_command_line_load_no_torch(folder: str) -> None:
    heavy = {"torch", "torchvision", "numpy", "matplotlib", "sklearn", "scipy"}
    workflows = {"workflows", "build", "defence", *PARTS} - {"attacks"}
    for module in sorted((PACKAGE / folder).rglob("*.py")):
        for name in imports(module, top_level_only=True):
            assert name.split(".")[0] not in heavy, f"{module.name} imports {name}"
            if name.startswith("carso_cli."):
                assert name.split(".")[1] not in workflows, f"{module.name} imports {name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(module: Path) -> None:
    text = module.read_text()
    assert text.count("\n") <= 300, "a file over 300 lines holds two ideas"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines"


def test_init_files_hold_no_logic() -> None:
    for module in PACKAGE.rglob("__init__.py"):
        if module.parent != PACKAGE:
            body = ast.parse(module.read_text()).body
            assert len(body) == 1, f"{module.relative_to(ROOT)} holds more than its docstring"


def test_readme_opens_with_the_commands_that_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    blocks = (ROOT / "README.md").read_text().split("```")
    commands = [line for line in blocks[1].splitlines()[1:] if line.startswith("pip install")]
    assert len(commands) == 2
    for command in commands:
        assert f"\n{command}\n" in script, f"{command} is not a line of .ci/run"
