"""Audits models of known robustness, and writes the table of `docs/audit-zoo.md`.

    python tests/audit/zoo_table.py [MODEL ...]               audits the zoo, or some of its models
    python tests/audit/zoo_table.py --file FILE.py [MODEL ...]    audits the models of another file
    python tests/audit/zoo_table.py --write FILE.md             writes what was measured as a page

Results are kept in `audit-zoo.jsonl` of the current folder, a line for each model, the last one of a model
counting. A file of other models defines `zoo()`, a dict of objects with `model`, `sound` and `random`;
`test_images(count)`; `true_accuracy(entry, images, labels)`; and `EPS`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # where this file is run as a script

from zoo import TRUTH, ZOO
from zoo_networks import EPS, held_out_images
from zoo_truth import TrickAttack

RESULTS = Path("audit-zoo.jsonl")
SOUND_IMAGES, MASKED_IMAGES = 200, 100
STATE = 2
"""Raised when attacks or scores change: rows that were measured before are marked."""


def audited(model: Any, images: Any, labels: Any, *, eps: float, name: str, budget: str) -> Any:
    from carso_cli.evaluation.audit import audit
    from carso_cli.runtime.reporter import SilentReporter

    return audit(
        model, images, labels, eps=eps, budget=budget, device="cpu", name=name, reporter=SilentReporter()
    )


def own_line(name: str, budget: str) -> dict[str, Any]:
    """Audit a model of the zoo; return what the table says of it."""
    entry = ZOO[name]
    images, labels = held_out_images(SOUND_IMAGES if entry.sound else MASKED_IMAGES)
    started = time.monotonic()
    report = audited(entry.make(), images, labels, eps=EPS, name=name, budget=budget)
    return _line("zoo", name, entry.sound, TRUTH[name][entry.sound], report, time.monotonic() - started)


def foreign_lines(file: Path, names: list[str], budget: str) -> Any:
    """Audit the models of another file; yield what the table says of each."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    for name, sound in [(name, entry.sound) for name, entry in module.zoo().items()]:
        if names and name not in names:
            continue
        images, labels = module.test_images(SOUND_IMAGES if sound else MASKED_IMAGES)
        torch.manual_seed(0)
        # Each from a zoo of its own: some remember, or have a network changed by another.
        entry = module.zoo()[name]
        if entry.random:
            # Unbiased, which a minimum over draws is not.
            make = functools.partial(getattr, entry, "model")
            attack = TrickAttack(make, (entry.model,), True, module.EPS, 40, 10, targets=3)
            truth = float(attack(images, labels).mean())
        else:
            truth = module.true_accuracy(entry, images, labels)
        model, started = module.zoo()[name].model, time.monotonic()
        report = audited(model, images, labels, eps=module.EPS, name=name, budget=budget)
        yield _line(file.name, name, sound, truth, report, time.monotonic() - started)


def _line(source: str, name: str, sound: bool, truth: float, report: Any, seconds: float) -> dict[str, Any]:
    return {
        "source": source,
        "name": name,
        "sound": sound,
        "images": report.n_images,
        "truth": truth,
        "headline": report.accuracy,
        "verdict": "trusted" if report.trusted else "not trusted",
        "failed": [check["name"] for check in report.failed],
        "broken_by": report.broken_by,
        "seconds": round(seconds, 1),
        "budget": report.summary["budget"],
        "state": STATE,
        "meanings": {check["name"]: check["meaning"] for check in report.failed},
    }


def page(lines: list[dict[str, Any]]) -> str:
    """Return the table as a page of the documentation."""
    masked = [line for line in lines if not line["sound"]]
    far = [line["name"] for line in masked if abs(line["headline"] - line["truth"]) > 0.05]
    wrong = [
        line["name"]
        for line in lines
        if (line["verdict"] == "trusted" and abs(line["headline"] - line["truth"]) > 0.02)
        or (line["sound"] and (line["verdict"] != "trusted" or abs(line["headline"] - line["truth"]) > 0.01))
    ]
    head = ("model", "of", "kind", "images", "truth", "headline", "verdict", "failed checks", "seconds")
    rows = [
        (
            line["name"] + " †" * (line.get("state", 1) < STATE),
            line["source"],
            "sound" if line["sound"] else "masked",
            str(line["images"]),
            f"{line['truth']:.3f}",
            f"{line['headline']:.3f}",
            line["verdict"],
            ", ".join(line["failed"]) or "–",
            f"{line['seconds']:.0f}",
        )
        for line in lines
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    return f"""# Audits of models whose robustness is known

Each model is audited at the standard budget on 8x8 digits, linf, eps 0.1, on one thread of a shared
CPU: sound ones on 200 images, masked ones on 100. The truth comes from an attack that knows the
model's trick. *Sound* means that the number must be trusted and be within a point of the truth; of
a masked model the number must be within two points of it, or not be trusted. Seconds are elapsed
time beside other work.

`python tests/audit/zoo_table.py` audits the models, and with `--write docs/audit-zoo.md` writes this page.
Rows marked † were measured before random models were attacked by the chance of an error, and scored on 100
draws.

{len(lines)} models, {len(masked)} of them masked. Farther than five points from the truth, of the
masked: {len(far)} ({", ".join(far) or "none"}). Not as it should be: {", ".join(wrong) or "none"}.

{table}
"""


def main() -> None:
    """Audit and print."""
    parser = argparse.ArgumentParser(description="audit models of known robustness")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--budget", default="standard")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    if arguments.write:
        stored = [json.loads(line) for line in RESULTS.read_text().splitlines()]
        last = {(line["source"], line["name"]): line for line in stored}
        arguments.write.write_text(page(sorted(last.values(), key=lambda line: not line["sound"])))
        return
    torch.set_num_threads(1)
    lines = (
        foreign_lines(arguments.file, arguments.names, arguments.budget)
        if arguments.file
        else (own_line(name, arguments.budget) for name in arguments.names or list(ZOO))
    )
    for line in lines:
        with RESULTS.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        kind = "sound" if line["sound"] else "masked"
        sys.stdout.write(
            f"{line['name']:20} {kind:6} truth {line['truth']:.3f} headline {line['headline']:.3f} "
            f"{line['verdict']:11} {line['seconds']:.0f} s {', '.join(line['failed'])}\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
