"""Device discipline without a GPU: real arithmetic on the CPU, with the device that a tensor would have.

    with pretended_gpu() as gpu:                 # torch.cuda says there is one
        train_purifier(recipe, run=run, device="cuda")
    gpu.copies, gpu.waits                        # Counter of places: transfers and host syncs

Every storage carries a device tag. A `TorchFunctionMode` answers `.device`, `.to`, `.cuda`, `.cpu`, `device=`
and `generator=`; a `TorchDispatchMode` sees every operation, backward passes included, and raises as a GPU
would when they mix devices. Values are real, so code that depends on data just runs. FakeTensorMode does not
serve: a CPU-only build of torch refuses its `to("cuda")`, and aborts at the first gradient.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN002, ANN003, ANN201, ANN202, ANN204, ANN205

from __future__ import annotations

import collections
import contextlib
import sys
import unittest.mock
import weakref
from typing import Any

import torch
import torch._dynamo  # before anything is patched: it builds tables of torch's functions when first imported
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, WILD = torch.device("cpu"), None
aten = torch.ops.aten
# Ops whose arguments may lie anywhere; index tensors of a GPU tensor may lie on the CPU, not the reverse.
_MOVES = {"copy_", "_to_copy", "set_", "_foreach_copy_"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount", "unique_dim"}


class DeviceMismatchError(RuntimeError):
    """What a GPU would have refused."""


def _normal(device: Any) -> torch.device:
    device = torch.device(device) if not isinstance(device, int) else torch.device("cuda", device)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


class Ledger:
    """Which storage is where, and where data and the host met."""

    def __init__(self) -> None:
        self.tags: dict[int, torch.device | None] = {}
        self.copies: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.ops = 0
        self.on_gpu = 0

    def of(self, tensor: torch.Tensor) -> torch.device | None:
        return self.tags.get(tensor.untyped_storage()._cdata, CPU)

    def tag(self, tensor: torch.Tensor, device: torch.device | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.tags:
            weakref.finalize(storage, self.tags.pop, key, None)
        self.tags[key] = device

    @staticmethod
    def place() -> str:
        """The innermost line of the project, and of the library that it called, if any."""
        library, frame = "", sys._getframe(1)
        while frame is not None:
            file, line = frame.f_code.co_filename, frame.f_lineno
            if "/carso_cli/" in file:
                return f"{file.split('/carso_cli/')[1]}:{line}" + (f" via {library}" if library else "")
            for name in ("advertorch/", "pyautoattack/", "torch/optim/", "torch/nn/utils"):
                if name in file and not library:
                    library = file.split("site-packages/")[-1] + f":{line}"
            frame = frame.f_back
        return library or "?"


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, ledger, device):
        ctx.ledger, ctx.back = ledger, ledger.of(tensor)
        with ledger.modes_off():
            moved = tensor.detach().clone()
        ledger.tag(moved, device)
        return moved

    @staticmethod
    def backward(ctx, gradient):
        with ctx.ledger.modes_off():
            moved = gradient.clone()
        ctx.ledger.tag(moved, ctx.back)
        return moved, None, None


class _Functions(TorchFunctionMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func, types, args=(), kwargs=None):
        ledger, kwargs = self.ledger, dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        if name == "__get__":
            if owner is torch.Tensor.device:
                return ledger.of(args[0]) or CPU
            if owner is torch.Tensor.is_cuda:
                return (ledger.of(args[0]) or CPU).type == "cuda"
            if owner is torch.Tensor.is_cpu:
                return (ledger.of(args[0]) or CPU).type == "cpu"
        if func is torch.Tensor.cpu:
            return self.move(args[0], CPU)
        if func is torch.Tensor.cuda:
            return self.move(args[0], _normal(args[1] if len(args) > 1 else "cuda"))
        if func is torch.Tensor.to:
            return self.to(*args, **kwargs)
        if (
            func in (torch.Tensor.numpy, torch.Tensor.__array__)
            and (ledger.of(args[0]) or CPU).type == "cuda"
        ):
            raise TypeError(f"can't convert cuda tensor to numpy at {ledger.place()}")
        device = kwargs.pop("device", None)
        source = kwargs.get("generator")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if device is not None:
            device = _normal(device)
        elif name.startswith("new_"):
            device = ledger.of(args[0])
        if source is not None:
            home = device or (ledger.of(tensors[0]) if tensors else CPU) or CPU
            if home.type != source.device.type:
                raise DeviceMismatchError(
                    f"{name}: a {source.device} generator for {home} at {ledger.place()}"
                )
        result = func(*args, **kwargs)
        if name == "__deepcopy__":
            ledger.tag(result, ledger.of(args[0]))
        made = device is not None or (not tensors and name != "tensor_split")
        if name == "as_tensor" and tensors and isinstance(args[0], torch.Tensor):
            return self.move(result, device) if device is not None else result
        if made and name not in ("__get__", "manual_seed", "seed", "set_rng_state"):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    ledger.tag(leaf, device or CPU)
        return result

    def to(self, tensor, *args, **kwargs):
        device, rest = kwargs.pop("device", None), []
        kwargs.pop("non_blocking", None)
        for value in args:
            if isinstance(value, torch.Tensor):
                device = self.ledger.of(value)
                rest.append(value.dtype)
            elif isinstance(value, torch.device | str) or type(value) is int:
                device = value
            elif not isinstance(value, bool):
                rest.append(value)
        changed = torch.Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        return changed if device is None else self.move(changed, _normal(device))

    def move(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        ledger, before = self.ledger, self.ledger.of(tensor)
        if before is WILD:
            ledger.tag(tensor, device)
            return tensor
        if before == device:
            return tensor
        where = f"{before.type}->{device.type} {ledger.place()}"
        ledger.copies[where] += 1
        ledger.bytes[where] += tensor.numel() * tensor.element_size()
        return _Move.apply(tensor, ledger, device)


class _Operations(TorchDispatchMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ledger, kwargs = self.ledger, kwargs or {}
        name = func.overloadpacket.__name__
        ledger.ops += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = self.common(name, args, tensors)
        if device is not None and device.type == "cuda":
            ledger.on_gpu += 1
            if name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
                ledger.waits[f"{name} {ledger.place()}"] += 1
            if name in _INDEXING and any(
                i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
            ):
                ledger.waits[f"{name}[mask] {ledger.place()}"] += 1
            if name in _INDEXING and any(i is not None and ledger.of(i) == CPU for i in args[1]):
                ledger.waits[f"{name}[cpu indices] {ledger.place()}"] += 1
        before = {tensor.untyped_storage()._cdata for tensor in tensors}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            # `set_` hands over a storage that is known already.
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in (
                before | ledger.tags.keys()
            ):
                ledger.tag(leaf, device if tensors else WILD)
        return result

    def common(self, name: str, args: Any, tensors: list[torch.Tensor]) -> torch.device | None:
        ledger = self.ledger
        if not tensors:
            return WILD
        if name in _MOVES:
            return ledger.of(tensors[0])
        checked = tensors
        if name in _INDEXING:
            home = ledger.of(args[0])
            for index in args[1]:
                if index is not None and ledger.of(index) not in (home, CPU, WILD):
                    raise DeviceMismatchError(
                        f"aten.{name}: indices on {ledger.of(index)}, tensor on {home} at {ledger.place()}"
                    )
            checked = [args[0], *[leaf for leaf in tree_leaves(args[2:]) if isinstance(leaf, torch.Tensor)]]
        found: dict[torch.device, torch.Tensor] = {}
        for tensor in checked:
            tag = ledger.of(tensor)
            if tag is not WILD:
                found.setdefault(tag, tensor)
                # A number of the CPU may meet tensors of a GPU.
                if tensor.ndim and not found[tag].ndim:
                    found[tag] = tensor
        if len(found) > 1:
            homes = {tag: tensor for tag, tensor in found.items() if tag != CPU or tensor.ndim}
            if len(homes) != 1:
                shapes = [(str(ledger.of(t)), tuple(t.shape)) for t in checked]
                raise DeviceMismatchError(f"aten.{name} mixes devices: {shapes} at {ledger.place()}")
            return next(iter(homes))
        return next(iter(found), WILD)


@contextlib.contextmanager
def pretended_gpu(count: int = 1):
    """One or more pretended GPUs, and what happened on them."""
    ledger = Ledger()
    functions, operations = _Functions(ledger), _Operations(ledger)

    @contextlib.contextmanager
    def modes_off():
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            yield

    ledger.modes_off = modes_off
    autocast = torch.autocast

    class _Autocast(autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    nothing = lambda *_, **__: None  # noqa: E731
    patches = {
        "torch.autocast": _Autocast,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: count,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": nothing,
        "torch.cuda.synchronize": nothing,
        "torch.cuda.empty_cache": nothing,
        "torch.cuda.get_device_name": lambda *_: "pretended GPU",
        "torch.cuda.mem_get_info": lambda *_: (2**36, 2**37),
        "torch.cuda.memory_allocated": lambda *_: 0,
        "torch.cuda.max_memory_allocated": lambda *_: 0,
        "torch.cuda.reset_peak_memory_stats": nothing,
        "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": nothing,
        "torch.cuda.is_current_stream_capturing": lambda: False,
    }
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(unittest.mock.patch(name, value))
        stack.enter_context(operations)
        stack.enter_context(functions)
        yield ledger
