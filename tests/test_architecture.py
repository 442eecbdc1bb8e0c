"""The rules of the layout, read from the source: import directions, one home a library, size caps."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "carso_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The rooms, from the ground up: a room may import from itself and from rooms above it in this table.
ROOMS = {
    # room            what it holds
    "errors": "the kinds of error, each with its exit code",
    "runtime": "device, precision, seed, signals, progress, patches of third-party packages",
    "io": "files: atomic writes, checksums, downloads, paths",
    "recipe": "what a run is, without torch",
    "distributed": "torchrun: world, rendezvous, batch statistics over all processes",
    "pictures": "the only home of matplotlib",
    "defence": "the paper: Sections 4.1 to 4.5 and Appendix B",
    "classifiers": "architectures and weights",
    "data": "data sets and image files",
    "attacks": "one attack a file",
    "runs": "run folders: records, summaries, checkpoints, locks",
    "build": "recipe section -> object",
    "evaluation": "`evaluate` and `attack`",
    "training": "`train-purifier` and `train-classifier`: Section 4.4 and Appendix C",
    "ablation": "`ablate`: Appendix D",
    "reports": "`report`: the paper's tables",
    "bench": "`bench`",
    "tools": "`predict`, `extract`, `export`, `import-release`, `quickstart`, `doctor`",
    "hardening": "`harden`: a purifier for a classifier that nobody may retrain",
    "cli": "the only home of typer and rich",
}
HEIGHT = {room: height for height, room in enumerate(ROOMS)}

# Parts are joined in `build` and above, so none of them knows another, or a recipe, or a run.
PARTS = {"defence", "classifiers", "data", "attacks"}
NEIGHBOURS = [PARTS, {"reports", "bench", "tools", "ablation"}]
GROUND = {"errors", "runtime", "io"}

HOMES = {
    "typer": {"cli"},
    "rich": {"cli"},
    "yaml": {"recipe"},
    "safetensors": {"runs", "classifiers", "data"},
    "advertorch": {"attacks", "runtime"},
    "pyautoattack": {"attacks", "runtime"},
    "robustbench": {"classifiers", "runtime"},
    "torchvision": {"classifiers", "data", "runtime"},
    "timm": {"classifiers"},
    "wandb": {"training"},
    "sklearn": {"data"},
    "matplotlib": {"pictures"},
    "pandas": {"reports"},
    "jinja2": {"reports"},
    "pydantic": {"recipe"},
    "onnxruntime": {"tools"},
    "torch.distributed": {"distributed"},
}


def room_of(module: Path) -> str:
    """First path component below the package: `attacks`, `build`, …"""
    return module.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(module: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(module.read_text())
    nodes: Iterator[ast.AST] = iter(tree.body) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_has_a_room() -> None:
    assert {room_of(module) for module in MODULES} == {*ROOMS, "__init__", "__main__"}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(module: Path) -> None:
    room = room_of(module)
    if room in {"__init__", "__main__"}:
        return
    for name in imports(module):
        other = name.split(".")[1] if name.startswith("carso_cli.") else room
        if other in (room, "__version__"):
            continue
        assert HEIGHT[other] < HEIGHT[room], f"{room} imports {other}, which is not below it"
        assert room not in PARTS or other in GROUND, f"{room} is a part, and {other} is no ground"
        assert not any({room, other} <= level for level in NEIGHBOURS), (
            f"{room} imports its neighbour {other}"
        )


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_library_has_one_home(module: Path) -> None:
    for name in imports(module):
        for library in (name.split(".")[0], ".".join(name.split(".")[:2])):
            if library in HOMES:
                assert room_of(module) in HOMES[library], f"{library} is imported in {room_of(module)}"


@pytest.mark.parametrize("folder", ["recipe", "cli"])
def test_recipes_and_command_line_load_no_torch(folder: str) -> None:
    heavy = {"torch", "torchvision", "numpy", "matplotlib", "sklearn", "scipy", "pandas"}
    light = {"errors", "io", "recipe", "cli", "runs", "reports", "attacks", "runtime", "distributed"}
    for module in sorted((PACKAGE / folder).rglob("*.py")):
        for name in imports(module, top_level_only=True):
            assert name.split(".")[0] not in heavy, f"{module.name} imports {name}"
            if name.startswith("carso_cli."):
                assert name.split(".")[1] in {*light, "__version__"}, f"{module.name} imports {name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(module: Path) -> None:
    text = module.read_text()
    assert text.count("\n") <= 400, "a file over 400 lines holds two ideas"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            # A comment with a reason is no reason to split a function.
            body = text.splitlines()[node.lineno - 1 : node.end_lineno]
            lines = sum(not line.lstrip().startswith("#") for line in body)
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
