"""RobustBench, whose models are the reference of ours."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from carso_cli.runtime.third_party import prepare, quiet


@pytest.fixture(scope="session")
def wide_resnets() -> Any:
    """RobustBench's module of `DMWideResNet` and `Swish`."""
    prepare()
    with quiet():
        import robustbench  # noqa: F401  (binds the classes of its model zoo)
        from robustbench.model_zoo.architectures import dm_wide_resnet

    def silu(_: nn.Module, features: Tensor) -> Tensor:
        return F.silu(features)

    # The gradient of its Swish reads `ctx.saved_variables`, of which torch warns at every step.
    dm_wide_resnet.Swish.forward = silu
    return dm_wide_resnet
