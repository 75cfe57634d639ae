"""Launch sizes of kernels, by device: a data file with a safe default, written by benchmarks/tune.py."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import mlx.core as mx

FILE = "launch.json"


@dataclass(frozen=True)
class Launch:
    """Sizes of the attention kernel.

    Attributes:
        warps: of a group.
        groups_per_core: that must fit a core (a multiprocessor) together: bounds its registers.
        groups: in all, about; each reads a part of the tokens.
    """

    warps: int = 4
    groups_per_core: int = 3
    groups: int = 256

    def with_fewer_groups(self, most: int) -> Launch:
        """At most `most` groups a core: kernels that need more registers."""
        if self.groups_per_core <= most:
            return self
        return replace(self, groups_per_core=most, groups=self.groups * most // self.groups_per_core)


def device_name() -> str:
    """The name of the default device as its driver gives it; `cpu` without a GPU."""
    if mx.default_device().type != mx.gpu:
        return "cpu"
    return str(mx.device_info(mx.default_device())["device_name"])


def table() -> dict[str, dict[str, Any]]:
    """The whole data file: sizes by device name, `default` for all others."""
    found: dict[str, dict[str, Any]] = json.loads(resources.files(__package__).joinpath(FILE).read_text())
    return found


@cache
def launch_sizes(device: str) -> Launch:
    """Sizes for a device, those called `default` if it has none of its own."""
    sizes = table()
    return Launch(**sizes.get(device, sizes["default"]))
