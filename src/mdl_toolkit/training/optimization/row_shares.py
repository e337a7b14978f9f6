"""Divide the update of large trained parameters among processes, and so the optimizer's states of them.

Each process updates its rows of every such parameter, and gets the others' rows after that. Parameters and
gradients stay whole on each; checkpoints hold whole states, whatever number of processes reads them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mdl_toolkit.training.lora import FULL_TARGETS
from mdl_toolkit.training.optimization.optimizer import OptimizerConfig, target_of
from mdl_toolkit.utils.distributed import World


class RowShares:
    """Hold this process's rows of the full copies among a run's trained parameters, if weights are sharded.

    The states of 8-bit optimizers, which have a scale for so many numbers of a tensor, are not divided.

    Attributes:
        stepped: what this process's optimizer updates: rows of full copies, everything else whole.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], config: OptimizerConfig, world: World) -> None:
        self._world = world
        is_dividing = world.is_sharding and config.name == "adamw"
        self._whole = {
            name: parameter
            for name, parameter in named.items()
            if is_dividing and target_of(name) in FULL_TARGETS
        }
        self.stepped = {
            name: nn.Parameter(self._own(parameter.data)) if name in self._whole else parameter
            for name, parameter in named.items()
        }

    def __bool__(self) -> bool:
        """Tell whether anything is divided."""
        return bool(self._whole)

    def _own(self, tensor: Tensor) -> Tensor:
        """Return this process's rows of a tensor, a view."""
        return tensor.tensor_split(self._world.size)[self._world.rank]

    def take_gradients(self) -> None:
        """Give the rows their gradients, before the optimizer makes a step."""
        for name, parameter in self._whole.items():
            self.stepped[name].grad = None if parameter.grad is None else self._own(parameter.grad)

    def spread(self) -> None:
        """Give all processes the rows that each has updated, and drop the rows' gradients."""
        for name, parameter in self._whole.items():
            self._world.spread(parameter.data.tensor_split(self._world.size))
            self.stepped[name].grad = None

    def gather(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the optimizer's states, in the first process with all rows; all processes call it.

        Args:
            states: this process's, named `PARAMETER/STATE`, on the host.
        """
        for key, rows in states.items():
            name, _, kind = key.rpartition("/")
            if name in self._whole and kind != "step":
                whole = torch.zeros(self._whole[name].shape)
                self._own(whole).copy_(rows)
                self._world.sum(whole)
                # Only the first one saves them: the others need not hold them all.
                if self._world.is_first:
                    states[key] = whole
        return states

    def scatter(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return states with this process's rows alone."""
        names = {key: key.rpartition("/") for key in states}
        return {
            key: self._own(tensor) if names[key][0] in self._whole and names[key][2] != "step" else tensor
            for key, tensor in states.items()
        }
