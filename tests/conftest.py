"""Fixtures shared by all tests."""

from __future__ import annotations

import lzma
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import settings

from carso_cli.recipe.load import load_recipe
from carso_cli.runtime.reporter import Progress

if TYPE_CHECKING:
    from tests.toys import DigitsRun

# `--hypothesis-profile long --hypothesis-seed N` tries twenty times as many cases, and others each time.
settings.register_profile("fast", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("suite", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile("suite")

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    # Workers share the processors: one thread each. torch reads this when it is first imported, which is why
    # nothing above imports it; processes that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that wait by spinning slow each other down many times over on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, default=12, help="Faults to plant in tests/faults.")
    parser.addoption("--seed", type=int, default=0, help="Seed of the faults.")
    parser.addoption(
        "--zoo", action="store_true", help="Audit every model of tests/audit; an hour of a core."
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if WORKER or not config.pluginmanager.hasplugin("xdist"):
        return
    # The whole suite runs on all processors; one file or folder starts sooner in this process. `-n` decides.
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.numprocesses is None:
        config.option.numprocesses, config.option.maxprocesses = "auto", 8
    if config.option.numprocesses and config.option.dist == "no":
        config.option.dist = "worksteal"


# What trains or starts processes.
SLOW_FIXTURES = {"digits_run", "finished", "torchrun", "workshop"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "hostile" or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not slow" and not config.getoption("--hypothesis-profile"):
        settings.load_profile("fast")


Make = Callable[[Path], object]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Make], Path]:
    """Return a folder that `make` fills once per session, whichever worker asks first."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if WORKER else base

    def folder(name: str, make: Make) -> Path:
        made = root / name
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                unfinished = Path(tempfile.mkdtemp(dir=root))
                make(unfinished)
                unfinished.rename(made)
        return made

    return folder


@pytest.fixture(scope="session")
def digits_run(once: Callable[[str, Make], Path]) -> DigitsRun:
    """A finished tiny run on digits, which every test may read; to write into it, copy its folder."""
    from carso_cli.training.purifier import train_purifier
    from tests.toys import TINY, DigitsRun

    recipe = load_recipe("digits", TINY)
    folder = once("digits-run", lambda run: train_purifier(recipe, run=run, device="cpu"))
    return DigitsRun(folder, recipe, TINY)


@pytest.fixture(scope="session")
def stored_run(once: Callable[[str, Make], Path]) -> Path:
    """The trained run of version 0.1.0 that the repository holds, as a run folder to read only."""
    stored = Path(__file__).with_name("stored_run")

    def unpack(run: Path) -> None:
        shutil.copytree(stored / "run", run, dirs_exist_ok=True)
        packed = (stored / "purifier.safetensors.xz").read_bytes()
        (run / "purifier.safetensors").write_bytes(lzma.decompress(packed))

    return once("stored-run", unpack)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder of golden tensors and real images beside the checkout."""
    if not (SHARED / "golden" / "README.md").is_file():
        pytest.skip("needs the golden tensors and real images of ../shared, which is absent here")
    return SHARED


@pytest.fixture(scope="session")
def golden_folder(shared_folder: Path) -> Path:
    return shared_folder / "golden"


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests never read or fill the user's own cache, and no power failure is feared for what they write.
    monkeypatch.setenv("CARSO_HOME", str(tmp_path_factory.mktemp("carso-home")))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    import torch

    torch.manual_seed(0)


@dataclass
class Site:
    """A web server on this machine: what it offers, how it misbehaves, and what it was asked for."""

    url: str = ""
    content: bytes = b""
    kind: str = "application/octet-stream"
    resumes: bool = True
    announces: bool = True
    """Whether it says how many bytes will come."""
    length: str = ""
    """What it says instead of the number of bytes."""
    version: str = ""
    """Its `ETag`."""
    cut_after: int | None = None
    """Bytes after which it closes the connection."""
    asked: list[str | None] = field(default_factory=list)
    """The `Range` of each request."""


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.asked.append(wanted)
            resumes = site.resumes and self.headers.get("If-Range", site.version) == site.version
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and resumes else 0
            whole = len(site.content)
            if start and start >= whole:
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
            self.send_header("Content-Type", site.kind)
            if site.announces:
                self.send_header("Content-Length", site.length or str(whole - start))
            if site.version:
                self.send_header("ETag", site.version)
            self.end_headers()
            # A client may have read enough.
            with suppress(ConnectionError):
                self.wfile.write(site.content[start:][: site.cut_after])

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def site() -> Iterator[Site]:
    found = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(found))
    found.url = f"http://127.0.0.1:{server.server_port}/a.zip"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    """The toy defences, as a fixture: where none is asked for, torch need not be imported."""
    from tests import toys

    return toys


@dataclass
class Recorder:
    """Remembers what it was told."""

    said: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    tasks: list[tuple[str, int, str]] = field(default_factory=list)
    steps: int = 0

    def info(self, message: str) -> None:
        self.said.append(message)

    def warning(self, message: str) -> None:
        self.warned.append(message)

    @contextmanager
    def progress(self, description: str, total: int, unit: str = "images") -> Iterator[Progress]:
        self.tasks.append((description, total, unit))
        yield self

    def measured(self, figures: Mapping[str, float], step: int) -> None:
        pass

    def pictured(self, name: str, draw: Callable[[], object], step: int) -> None:
        pass

    def advance(self, steps: int = 1, **figures: float) -> None:
        self.steps += steps


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
