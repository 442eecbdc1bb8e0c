"""The documentation's table of licences is what the installed dependencies say of themselves."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    r"BSD|[23]-Clause": "BSD",
    r"MIT-CMU": "MIT-CMU",
    r"\bMIT\b(?!-)": "MIT",
    r"Apache": "Apache-2.0",
    r"MPL|Mozilla": "MPL-2.0",
    r"PSF|Python Software Foundation": "PSF-2.0",
    r"ISC": "ISC",
    r"BSL": "BSL-1.0",
    r"Zlib": "Zlib",
    r"CC0": "CC0-1.0",
    r"LESSER GENERAL PUBLIC LICENSE\s+Version 3": "LGPL-3.0",
}
# Parts of torch's builds for GPUs, which bring their vendor's terms.
OF_THE_VENDOR = re.compile(r"nvidia-|cuda-|triton|pytorch-triton")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_dependencies() -> dict[str, str]:
    """What carso and its extras need here, directly or not: name to licence."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for name, extra in project["optional-dependencies"].items():
        # The client of a service, which neither tests nor constraints.txt install.
        wanted += [] if name == "wandb" else extra
    found: dict[str, str] = {}
    seen: set[str] = set()
    while wanted:
        text = wanted.pop()
        if text in seen:
            continue
        seen.add(text)
        requirement = Requirement(text)
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        if requirement.name == "carso":
            continue
        found[canonical(requirement.name)] = licence_of(distribution)
        for line in distribution.requires or []:
            marker = Requirement(line).marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                wanted.append(line)
    return found


def licence_of(distribution: metadata.Distribution) -> str:
    """The licences that a distribution names, in alphabetical order."""
    about = distribution.metadata.json
    classifiers = [line for line in about.get("classifier", ()) if line.startswith("License")]
    said = str(about.get("license_expression") or " ".join(classifiers) or about.get("license") or "")
    if not said:
        files = [path for path in distribution.files or [] if re.search(r"LICENSE$", str(path))]
        said = "\n".join(path.read_text()[:200] for path in files)
    return ", ".join(sorted({name for pattern, name in NAMES.items() if re.search(pattern, said)}))


def table() -> dict[str, str]:
    """The documentation's table: name to licence."""
    section = (ROOT / "docs" / "licences.md").read_text()
    found = {}
    for line in re.findall(r"^\| (.+) \| (.+) \|$", section, flags=re.M)[2:]:
        for name in line[1].split(", "):
            assert canonical(name) not in found, f"{name} is listed twice"
            found[canonical(name)] = line[0]
    return found


def test_every_installed_dependency_is_listed_with_its_licence() -> None:
    installed = {
        name: licence for name, licence in installed_dependencies().items() if not OF_THE_VENDOR.match(name)
    }
    assert {"torch", "pydantic", "pytest"} <= installed.keys()
    assert installed == {name: licence for name, licence in table().items() if name in installed}


def test_every_pinned_dependency_is_listed_and_no_other() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert sorted(table()) == sorted(canonical(line.split("==")[0]) for line in lines if "==" in line)
