"""A default choice of layers for the internal representation, by the rule behind Table 7.

Table 7 takes, of a WideResNet, both convolutions of every block, and the shortcuts that halve the resolution;
not the first convolution of all, nor the one shortcut that keeps the resolution. For any other classifier:
the first two convolutions of every block, and its shortcut if that shrinks the map. A block is the innermost
module around two convolutions or more. Where there is but one, as in plain stacks of convolutions, the first
two of every resolution are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

from torch import nn

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Of one image: what went into a module, and what came out."""

_SHORTCUT_NAMES = ("shortcut", "downsample", "skip")
_PER_BLOCK = 2


def default_layers(classifier: nn.Module, shapes: Mapping[str, Shapes]) -> tuple[str, ...]:
    """Choose layers for the internal representation.

    Args:
        classifier: Any classifier of images.
        shapes: Of its modules, in the order in which they ran; see
            `carso_cli.defence.representation.module_shapes`.

    Returns:
        Names of convolutions in the order in which they ran; none if no convolution gives square maps.
    """
    modules = dict(classifier.named_modules())
    maps = [name for name in shapes if _gives_maps(modules[name], shapes[name][1])]
    blocks: dict[str, list[str]] = {}
    for name in maps:
        blocks.setdefault(_block_of(name, maps, modules), []).append(name)
    # What holds other blocks is the network around them, and its own convolutions the stem.
    inner = [block for block in blocks if not any(_inside(other, block) for other in blocks)]
    if len(inner) == 1:
        # Runs, not a count per resolution: a stack may come back to a resolution later.
        runs = groupby(blocks[inner[0]], key=lambda name: shapes[name][1][1:])
        return tuple(name for _, run in runs for name in list(run)[:_PER_BLOCK])
    chosen: set[str] = set()
    for block in inner:
        shortcuts = [name for name in blocks[block] if _is_shortcut(name, modules[name])]
        # A block that takes more than one tensor has no recorded shape; its shortcuts are left out.
        size = shapes[block][0][-1] if block in shapes else 0
        chosen.update([name for name in blocks[block] if name not in shortcuts][:_PER_BLOCK])
        chosen.update(name for name in shortcuts if shapes[name][1][-1] < size)
    return tuple(name for name in maps if name in chosen)


def _gives_maps(module: nn.Module, shape: tuple[int, ...]) -> bool:
    # A map of one pixel has nothing for the layer encoder's convolutions.
    return isinstance(module, nn.Conv2d) and len(shape) == 3 and shape[1] == shape[2] > 1


def _is_shortcut(name: str, module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1):
        return False
    # By stride or name: a bottleneck has 1x1 convolutions that are no shortcuts.
    return module.stride != (1, 1) or any(part in name for part in _SHORTCUT_NAMES)


def _block_of(name: str, maps: Iterable[str], modules: Mapping[str, nn.Module]) -> str:
    """Return the innermost module around a convolution that is no mere list, and holds another one too."""
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        holds = sum(_inside(other, parent) for other in maps)
        if holds > 1 and not isinstance(modules[parent], nn.Sequential | nn.ModuleList):
            return parent
    return ""


def _inside(name: str, module: str) -> bool:
    return name != module and (not module or name.startswith(f"{module}."))
