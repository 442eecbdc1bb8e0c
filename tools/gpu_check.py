#!/usr/bin/env python
"""What carso does on a GPU, measured in ten minutes: run by hand on a machine that has one.

    python tools/gpu_check.py --out figures --data FOLDER     # FOLDER: cifar10-train.zip, cifar10-test.zip
    python tools/gpu_check.py --out figures --cpu             # the same in small, to see that it runs

Every phase is a process of its own with a deadline; `phases.jsonl` in --out gains one object for each, with
the figures that the phase had found when it ended or was stopped. Late phases are skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DEADLINE = 600.0
"""Seconds for all phases."""


@dataclass
class Check:
    """One phase under way.

    Args:
        out: Where its figures go.
        cpu: Whether this is the small form on a CPU.
        data: Folder of the two CIFAR-10 zips, if given.
        name: Of the phase.
    """

    out: Path
    cpu: bool
    data: Path | None
    name: str

    def __post_init__(self) -> None:
        self.figures: dict[str, Any] = {}

    @property
    def device(self) -> str:
        """Name of the device."""
        return "cpu" if self.cpu else "cuda"

    def found(self, **figures: object) -> None:
        """Store figures at once: a phase that is stopped later keeps them."""
        self.figures |= figures
        (self.out / f"{self.name}.json").write_text(json.dumps(self.figures, default=str))

    def seconds(self, work: Callable[[], object], rounds: int = 5) -> float:
        """Return the median time of a piece of work, after one run to warm up."""
        import torch

        times = []
        for turn in range((2 if self.cpu else rounds) + 1):
            started = time.perf_counter()
            work()
            if not self.cpu:
                torch.cuda.synchronize()
            if turn:
                times.append(time.perf_counter() - started)
        return statistics.median(times)

    def recipe(self, *overrides: str, name: str = "") -> Any:  # noqa: ANN401  (a recipe, imported late)
        """Load the recipe that is measured: the paper's scenario (a), or digits on a CPU."""
        from carso_cli.recipe.load import load_recipe

        return load_recipe(name or ("digits" if self.cpu else "cifar10"), overrides)


def machine(check: Check) -> None:
    """Versions, bandwidths, and matrix products by precision."""
    import torch

    from carso_cli.bench.profiling import peak_flops
    from carso_cli.runs.description import describe_environment

    device = torch.device(check.device)
    check.found(environment=describe_environment(device))
    count = 2**22 if check.cpu else 2**30
    source, host = torch.zeros(count, dtype=torch.uint8, device=device), torch.zeros(count, dtype=torch.uint8)
    check.found(copy_gb_per_s=2 * count / check.seconds(lambda: source.clone()) / 1e9)
    check.found(to_host_gb_per_s=count / check.seconds(lambda: host.copy_(source)) / 1e9)
    check.found(to_device_gb_per_s=count / check.seconds(lambda: source.copy_(host)) / 1e9)
    for precision in ("fp32", "bf16") if check.cpu else ("fp32", "tf32", "bf16"):
        check.found(
            **{
                f"tflops_{precision}": peak_flops(
                    precision,
                    device,
                )
                / 1e12
            }
        )


def tests(check: Check) -> None:
    """Run the fast tests."""
    chosen = ["tests/attacks/test_losses.py"] if check.cpu else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *chosen]
    # Without --strict-markers and the like: the machine may lack the plugins of a developer.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    check.found(rc=done.returncode, tail=done.stdout[-2000:])


def agreement(check: Check) -> None:
    """Agreement with the CPU; save here, load there; out of memory; a group of one process."""
    import torch

    from carso_cli import load_defence
    from carso_cli.attacks.defence_target import DefenceTarget
    from carso_cli.attacks.losses import cross_entropy
    from carso_cli.attacks.pgd import PGD
    from carso_cli.attacks.threat_model import ThreatModel
    from carso_cli.build import load_images
    from carso_cli.runtime.reporter import SILENT
    from carso_cli.runtime.seed import generator
    from carso_cli.training.purifier import train_purifier

    run, recipe = check.out / "digits-run", check.recipe(*_TINY, name="digits")
    train_purifier(recipe, run=run, device=check.device, reporter=SILENT)
    images, answers = load_images(recipe, "test", limit=8), []
    for device in ("cpu", check.device):
        defence = load_defence(run, device=device)
        target = DefenceTarget(defence, "exact", 64, generator(0, "latents"))
        pixels, labels = images.pixels(slice(None)).to(device), images.labels.to(device)
        found = target.loss_and_gradient(pixels, labels, cross_entropy, 4)
        start = PGD(ThreatModel("linf", 0.1), steps=1, step_size=0.1, seed=1).start(pixels)
        answers.append([tensor.cpu() for tensor in (found.loss, found.gradient, start)])
    names = ("loss", "gradient", "start")
    for name, one, other in zip(names, *answers, strict=True):
        difference = (one - other).norm() / one.norm().clamp(min=1e-30)
        check.found(**{f"{name}_relative_difference": difference.item()})
    _out_of_memory(check, torch)
    _one_process(check, torch)


def _out_of_memory(check: Check, torch: Any) -> None:  # noqa: ANN401  (the module)
    """Let a pass run out of memory, and see that smaller ones answer."""
    from carso_cli.attacks.passes import Passes

    total = 2**40 if check.cpu else torch.cuda.mem_get_info()[1]
    tried = []

    def work(part: slice) -> int:
        tried.append(part.stop - part.start)
        if check.cpu and tried[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if not check.cpu:
            torch.empty(tried[-1] * total // 4, dtype=torch.uint8, device="cuda")
        return tried[-1]

    check.found(out_of_memory_done=sum(Passes(8).over(8, work)), out_of_memory_passes=tried)


def _one_process(check: Check, torch: Any) -> None:  # noqa: ANN401  (the module)
    """Form a group of one process by nccl, and compare synchronised batch statistics with plain ones."""
    dist, device = torch.distributed, torch.device(check.device)
    with tempfile.TemporaryDirectory() as folder:
        backend = "gloo" if check.cpu else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        plain = torch.nn.BatchNorm2d(4).to(device)
        if check.cpu:
            from carso_cli.distributed.sync_batch_norm import CpuSyncBatchNorm
            from carso_cli.distributed.world import all_reduce

            layer = CpuSyncBatchNorm(torch.nn.BatchNorm2d(4), all_reduce)
        else:
            layer = torch.nn.SyncBatchNorm(4).to(device)
        values = torch.randn(16, 4, 8, 8, device=device)
        check.found(sync_batch_norm_difference=(plain(values) - layer(values)).abs().max().item())
        summed = torch.ones(1, device=device)
        dist.all_reduce(summed)
        check.found(all_reduce_of_one=summed.item())
        dist.destroy_process_group()


def bench(check: Check) -> None:
    """Time the cases of `carso bench` by precision, benchmark flag and compilation."""
    import torch

    from carso_cli.bench.run import bench as timed
    from carso_cli.runtime.reporter import SILENT

    variants = (
        [("fp32", True, False)]
        if check.cpu
        else [
            *(("bf16", True, False), ("bf16", False, False), ("tf32", True, False)),
            *(("fp32", True, False), ("bf16", True, True)),
        ]
    )
    cases = (
        ("classifier-gradient",)
        if check.cpu
        else ("classifier-forward", "classifier-gradient", "defence-forward")
    )
    for precision, flag, compiled in variants:
        recipe = check.recipe(f"precision={precision}", f"compile={str(compiled).lower()}")
        name = f"{precision}{'' if flag else ', no benchmark'}{', compiled' if compiled else ''}"
        torch.backends.cudnn.benchmark = flag
        result = timed(
            recipe,
            reporter=SILENT,
            device=check.device,
            batch_size=4 if check.cpu else None,
            cases=cases,
            rounds=3,
        )
        check.found(**{name: result["cases"]})


def steps(check: Check) -> None:
    """One EoT step of 128 images x 20 draws x 8 samples, and training steps of 640 and 5,120 images."""
    import torch

    from carso_cli.bench.cases import CASES, set_up
    from carso_cli.bench.profiling import counted_operations, peak_flops

    device = torch.device(check.device)
    for precision in ("bf16",) if check.cpu else ("bf16", "tf32"):
        peak = peak_flops(precision, device)
        for case, size in (
            ("eot-step", 4 if check.cpu else 128),
            ("training-step", 8 if check.cpu else 640),
            ("training-step", 16 if check.cpu else 5120),
        ):
            name = f"{case} of {size}, {precision}"
            small = _TINY if check.cpu else ()
            try:
                work = CASES[case](set_up(check.recipe(f"precision={precision}", *small), device, size)).ours
                if not check.cpu:
                    torch.cuda.reset_peak_memory_stats()
                took = check.seconds(work, rounds=1)
                memory = 0 if check.cpu else torch.cuda.max_memory_allocated()
                # Counting runs the work once more, and the largest has the same share as the other.
                share = counted_operations(work) / took / peak if size != 5120 else None
                check.found(
                    **{
                        name: {
                            "seconds": took,
                            "images_per_second": size / took,
                            "peak_memory_bytes": memory,
                            "share_of_peak": share,
                        }
                    }
                )
            # One that does not fit must not cost the others.
            except RuntimeError as error:
                check.found(**{name: {"error": str(error).splitlines()[0]}})
            if not check.cpu:
                torch.cuda.empty_cache()


def checkpoint(check: Check) -> None:
    """How long training waits for a state of the paper's size, and how long it takes to be written."""
    import torch

    from carso_cli.bench.cases import set_up
    from carso_cli.runs.checkpoints import StateFile

    purifier = set_up(check.recipe(*(_TINY if check.cpu else ())), torch.device(check.device)).purifier
    # Fast and slow weights, and two moments.
    tensors = {f"{part}.{name}": one for part in range(4) for name, one in purifier.state_dict().items()}
    file = StateFile(check.out / "state.safetensors")
    started = time.perf_counter()
    file.save(tensors, {})
    check.found(
        bytes=sum(one.nbytes for one in tensors.values()), waits_seconds=time.perf_counter() - started
    )
    file.wait()
    check.found(written_seconds=time.perf_counter() - started)
    file.path.unlink()


def train(check: Check) -> None:
    """Adversarially train a WRN-16-4 in bf16, and its purifier, on CIFAR-10; digits on a CPU."""
    from carso_cli.runtime.reporter import SILENT
    from carso_cli.training.classifier import train_classifier
    from carso_cli.training.purifier import train_purifier

    recipe, weights = _trained_recipe(check), check.out / "classifier"
    started = time.perf_counter()
    result = train_classifier(recipe, "at", run=weights, reporter=SILENT, device=check.device)
    check.found(classifier=result, classifier_seconds=time.perf_counter() - started)
    started = time.perf_counter()
    result = train_purifier(recipe, run=check.out / "run", reporter=SILENT, device=check.device)
    check.found(purifier=result, purifier_seconds=time.perf_counter() - started)


def audit(check: Check) -> None:
    """Audit 1,000 images of what the phase before has trained: the classifier, then the defence."""
    from carso_cli import load_defence
    from carso_cli.build import build_classifier, load_images
    from carso_cli.evaluation.audit import audit as audited
    from carso_cli.runtime.reporter import SILENT
    from carso_cli.tools.target import ExactView

    recipe = _trained_recipe(check)
    images = load_images(recipe, "test", limit=4 if check.cpu else 1000)
    models = {
        "classifier": lambda: build_classifier(recipe, "at", check.device),
        # As `carso audit RUN` does: the logits that an attacker would follow.
        "defence": lambda: ExactView(load_defence(check.out / "run", device=check.device)),
    }
    for name, model in models.items():
        started = time.perf_counter()
        report = audited(
            model(),
            images,
            eps=recipe.threat.eps,
            budget="quick" if check.cpu else "standard",
            device=check.device,
            reporter=SILENT,
            out=check.out / f"audit-{name}",
        )
        check.found(
            **{
                name: {
                    "seconds": time.perf_counter() - started,
                    "robust": report.accuracy,
                    "clean": report.clean_accuracy,
                    "trusted": report.trusted,
                }
            }
        )


def _trained_recipe(check: Check) -> Any:  # noqa: ANN401  (a recipe, imported late)
    weights = f"classifier.at={{source: file, file: {check.out / 'classifier' / 'classifier.safetensors'}}}"
    if check.cpu:
        return check.recipe(*_TINY, weights, "classifier.training.epochs=1", name="digits")
    if check.data is None:
        raise SystemExit("this phase needs --data FOLDER with cifar10-train.zip and cifar10-test.zip")
    return check.recipe(
        *(weights, f"data.root={check.data}", "precision=bf16", "classifier.depth=16", "classifier.width=4"),
        *("classifier.training.epochs=8", "classifier.training.batch_size=512", "training.batch_size=512"),
        name="cifar10-small",
    )


_TINY = (
    *("data.train_limit=48", "training.epochs=1", "training.learning_rate.warmup_epochs=1"),
    *("training.learning_rate.plateau_epochs=0", "training.learning_rate.annealing_epochs=0"),
    *(
        "training.beta_increase.first_epoch=0",
        "training.beta_increase.last_epoch=1",
        "training.batch_size=24",
    ),
    *("training.attack_mix.pgd_steps=1", "purifier.condition_features=16", "purifier.latent_features=4"),
    *("evaluation.n_samples=2", "evaluation.eot_draws=1", "evaluation.scoring_draws=2"),
)

PHASES: dict[Callable[[Check], None], float] = {
    machine: 40,
    tests: 100,
    agreement: 45,
    bench: 110,
    steps: 90,
    checkpoint: 30,
    train: 170,
    audit: 120,
}
"""What is measured, in this order, and the most seconds of each."""


def run_phase(phase: Callable[[Check], None], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one phase in a process of its own; return its line of `phases.jsonl`."""
    name = phase.__name__
    command = [sys.executable, __file__, "--phase", name, "--out", str(options.out)]
    command += ["--cpu"] * options.cpu + (["--data", str(options.data)] if options.data else [])
    stored, started = options.out / f"{name}.json", time.monotonic()
    stored.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        status, told = ("done" if done.returncode == 0 else "failed"), done.stderr
    except subprocess.TimeoutExpired as late:
        told = late.stderr.decode(errors="replace") if isinstance(late.stderr, bytes) else ""
        status = "stopped at its deadline"
    figures = json.loads(stored.read_text()) if stored.is_file() else {}
    stored.unlink(missing_ok=True)
    line = {"phase": name, "status": status, "seconds": time.monotonic() - started, **figures}
    return line | ({} if status == "done" else {"stderr": told[-2000:]})


def main() -> int:
    """Run all phases, or the one that is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--data", type=lambda text: Path(text).resolve())
    parser.add_argument("--cpu", action="store_true", help="the same in small on a CPU")
    parser.add_argument("--phase", choices=[phase.__name__ for phase in PHASES], help="this one, in here")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.phase:
        chosen = next(phase for phase in PHASES if phase.__name__ == options.phase)
        try:
            chosen(Check(options.out, options.cpu, options.data, options.phase))
        except Exception:
            traceback.print_exc()
            return 1
        return 0
    began, failed = time.monotonic(), 0
    # A CPU that others use too may be slow, and there nothing is measured.
    patience = 5.0 if options.cpu else 1.0
    for phase, seconds in PHASES.items():
        most, left = patience * seconds, patience * DEADLINE - (time.monotonic() - began)
        # A phase that has less than a third of its time would only be cut off.
        if left < most / 3:
            line: dict[str, Any] = {"phase": phase.__name__, "status": "skipped", "seconds": 0.0}
        else:
            line = run_phase(phase, options, min(most, left))
        failed += line["status"] == "failed"
        with (options.out / "phases.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        sys.stdout.write(f"{line['phase']}: {line['status']}, {line['seconds']:.0f} s\n")
        sys.stdout.flush()
    return failed


if __name__ == "__main__":
    sys.exit(main())
