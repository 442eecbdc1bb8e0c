"""`carso reproduce`, against a server on this machine that offers made-up files in the authors' layout."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save

from carso_cli.build import build_purifier, untrained_classifier
from carso_cli.classifiers.registry import RELEASE_URL, RELEASES
from carso_cli.cli.app import run as carso
from carso_cli.data.cifar import cifar_class
from carso_cli.defence.release_format import PUBLISHED_PARTS, to_release
from carso_cli.errors import MissingError, UsageError, WeightsError
from carso_cli.io import download
from carso_cli.io.paths import weights_home
from carso_cli.recipe.load import load_recipe
from carso_cli.runtime.reporter import SILENT
from carso_cli.tools.assets import take_stock
from carso_cli.tools.reproduce import plan_reproduction, reproduce
from tests.toys import TINY

# Small, but for its size the paper's own: WideResNet, layers by their names, three files.
SMALL = (
    *(change for change in TINY if not change.startswith(("data.", "training."))),
    *("classifier.depth=10", "classifier.width=1", "evaluation.apgd_steps=1", "evaluation.pgd_eot_steps=1"),
)
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """Files by their published address, served on loopback; no other address is asked."""
    files: Files = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path.removeprefix("/"))
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    opened: Callable[..., Any] = download.open_url

    def on_loopback(url: str, *rest: Any) -> Any:
        return opened(f"http://127.0.0.1:{server.server_port}/{url}", *rest)

    monkeypatch.setattr(download, "open_url", on_loopback)
    yield files
    server.shutdown()
    server.server_close()


def authors_files(kind: str = "at") -> Files:
    """The four files of a release, with initial weights, by address."""
    release = RELEASES["cifar10", kind]
    classifier = untrained_classifier(load_recipe("cifar10", SMALL))
    purifier = build_purifier(load_recipe("cifar10", SMALL), classifier).state_dict()
    found = {release.url + release.classifier: save(dict(classifier.state_dict()))}
    for part in PUBLISHED_PARTS:
        found[f"{release.url}{release.purifier}_{part}.safetensors"] = save(to_release(part, purifier))
    return found


def cifar(monkeypatch: pytest.MonkeyPatch) -> Files:
    """CIFAR-10's archive in the official layout, of 20 images a file, with checksums of its own."""
    facts, random = cifar_class("cifar10"), np.random.default_rng(0)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    members = {"batches.meta": pickle.dumps({"label_names": [*map(str, range(10))]})}
    for name in names:
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        members[name] = pickle.dumps({"data": pixels, "labels": [*range(10)] * 2})
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
    monkeypatch.setattr(facts, "tgz_md5", hashlib.md5(stream.getvalue()).hexdigest())
    monkeypatch.setattr(facts, "train_list", [(name, md5[name]) for name in names[:-1]])
    monkeypatch.setattr(facts, "test_list", [("test_batch", md5["test_batch"])])
    monkeypatch.setattr(facts, "meta", facts.meta | {"md5": md5["batches.meta"]})
    return {CIFAR_URL: stream.getvalue()}


def options(*more: str) -> list[str]:
    return [word for change in SMALL for word in ("--set", change)] + ["--device", "cpu", *more]


@pytest.mark.slow
def test_one_line_gives_the_row_beside_the_papers(
    served: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served |= authors_files() | cifar(monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    assert carso(["reproduce", "cifar10", *options("--limit", "10")]) == 0
    shown = capsys.readouterr().out
    for text in ("Table 2. ", "measured, the authors' procedure", "measured, adaptive", "0.7613 (0.7689)"):
        assert text in shown
    # The purifier is the authors', so nothing is said of training; the sizes and the budget are not theirs.
    assert "‡ Differs from the paper's recipe" in shown
    assert "width 1, not 10" in shown
    assert "epochs" not in shown
    # Nothing is asked for again, and the same row is shown.
    served.clear()
    assert carso(["reproduce", "cifar10", *options("--limit", "10")]) == 0
    assert capsys.readouterr().out == shown
    assert carso(["evaluate", "--run", "runs/cifar10-authors", "--attack", "none", "--device", "cpu"]) == 0


@pytest.mark.slow
def test_every_stage_takes_up_what_an_earlier_call_left(
    served: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = authors_files("clean") | authors_files() | cifar(monkeypatch)
    plan = plan_reproduction("cifar10", SMALL, first="clean", second="at")
    assert (plan.table, str(plan.run)) == ("17", "runs/cifar10-authors-clean-at")
    chosen: dict[str, Any] = {"reporter": SILENT, "attacks": ("authors",), "limit": 4, "device": "cpu"}
    # Data, two classifiers, then the three files of the purifier: one more with each call.
    for address in sorted(everything, key=lambda url: ("_own_2025_" in url, url)):
        with pytest.raises(MissingError, match="404"):
            reproduce(plan, **chosen)
        served[address] = everything[address]
    result = reproduce(plan, **chosen)
    assert [name.rpartition("2025_")[2] for name in result["files"]] == [
        f"{part}.safetensors" for part in PUBLISHED_PARTS
    ]
    first, second = (
        result["evaluations"]["authors"]["settings"]["identity"][name]
        for name in ("classifier", "second_classifier")
    )
    assert first != second


@pytest.mark.slow
def test_a_file_that_changed_is_refused(served: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    served |= authors_files() | cifar(monkeypatch)
    plan = plan_reproduction("cifar10", SMALL)
    address = next(url for url in served if url.endswith("_decoder.safetensors"))
    chosen: dict[str, Any] = {"reporter": SILENT, "attacks": (), "device": "cpu"}
    reproduce(plan, **chosen)
    path = weights_home() / "carso2024cnn" / plan.release.purifier / address.rpartition("/")[2]
    original = path.read_bytes()
    path.write_bytes(original[:-1] + b"?")
    with pytest.raises(WeightsError, match="it is not what was downloaded") as caught:
        reproduce(plan, **chosen)
    assert caught.value.hint == f"remove what is damaged: {path.parent}"
    # Nor does the server get away with another file under the same name.
    path.unlink()
    served[address] = authors_files()[address][:-1] + b"?"
    with pytest.raises(MissingError, match="holds that of the first download"):
        reproduce(plan, **chosen)
    served[address] = original
    assert reproduce(plan, **chosen)["files"][path.name] == hashlib.sha256(original).hexdigest()


@pytest.mark.slow
def test_a_dry_run_says_sizes_time_and_commands_and_does_nothing(
    served: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "cifar10", *options("--limit", "10", "--dry-run")]
    assert carso([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    classifier, *_ = authors_files().values()
    sizes = {file["what"]: file["bytes"] for file in found["files"]}
    assert sizes["CIFAR-10"] == 170_498_071
    # A safetensors file is its tensors and a short header.
    assert 0 <= len(classifier) - sizes["cifar10_a3_b10_t4_20m_w.safetensors"] < 20_000
    assert found["bytes"] == sum(sizes.values())
    assert [one["attack"] for one in found["evaluations"]] == ["authors", "adaptive"]
    assert all(one["seconds"] > 0 for one in found["evaluations"])
    assert found["commands"][-2:] == [
        "carso evaluate --run runs/cifar10-authors --attack adaptive --limit 10",
        "carso report runs/cifar10-authors --table 2",
    ]
    assert not weights_home().exists()
    assert [*Path().iterdir()] == []
    assert carso(command) == 0
    assert f"from {RELEASE_URL}cifar_10_cuiwrn2810/models/\n" in capsys.readouterr().out


def test_the_files_of_every_row_are_known() -> None:
    for name, kind in RELEASES:
        plan = plan_reproduction(name, first=kind, second="at")
        assert plan.table == ("17" if kind == "clean" else "18" if "-" in name else "2")
        (purifier,) = (item for item in take_stock(plan.recipe) if item.role == "purifier")
        assert (purifier.source, purifier.required) == (plan.release.url, False)
    assert not plan_reproduction("cifar10-gowal2020").release.listed


def test_doctor_names_the_authors_files() -> None:
    items = {item.role: item for item in take_stock(load_recipe("cifar10"))}
    clean = "cifar_10_ownwrn2810/WRN_28_10_cifar10_09428.safetensors"
    assert items["clean"].note == f"the authors publish theirs: {RELEASE_URL}{clean}"
    assert items["purifier"].command == "carso reproduce cifar10"


def test_what_is_not_published_is_said() -> None:
    with pytest.raises(UsageError, match="publish no at classifier for recipe 'digits'") as caught:
        plan_reproduction("digits")
    assert "cifar10, cifar10-gowal2020" in str(caught.value.hint)
    with pytest.raises(UsageError, match="publish no clean classifier for recipe 'tinyimagenet200'"):
        plan_reproduction("tinyimagenet200", first="clean")
