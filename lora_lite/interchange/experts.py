"""How PEFT's files hold LoRA on a mixture's stacked experts (`target_parameters`).

PEFT wraps the experts module once for each parameter, in the parameters' order in the module: the last one's tensors
are `experts.lora_A`, the one's before it `experts.base_layer.lora_A`. Its lora_A has the experts one after the other
(E·r × K); in its lora_B they are the fastest dimension (N × r·E).
"""

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from ..errors import CheckpointError
from ..stacks import stacks_of
from ..targets import Target

_NESTED = ".base_layer"


def flat(A: Float[Tensor, "E R K"], B: Float[Tensor, "E N R"]) -> tuple[Float[Tensor, "ER K"], Float[Tensor, "N RE"]]:
    """A stack's tensors as PEFT has them."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def stacked(
    A: Float[Tensor, "ER K"], B: Float[Tensor, "N RE"], experts: int
) -> tuple[Float[Tensor, "E R K"], Float[Tensor, "E N R"]]:
    """PEFT's tensors as a stack's."""
    if A.ndim != 2 or B.ndim != 2 or len(A) % experts or B.shape[1] % experts:
        raise CheckpointError(f"ranks of {tuple(A.shape)} and {tuple(B.shape)} can't be shared by {experts} experts")
    return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def names_in_file(stacks: Iterable[Target]) -> dict[str, str]:
    """Under which layer's name the file holds each of these stacks, which are all that are adapted, by their names."""
    found: dict[str, str] = {}
    of_module: dict[str, list[Target]] = {}
    for target in stacks:
        of_module.setdefault(target.name.rpartition(".")[0], []).append(target)
    for module, targets in of_module.items():
        order = list(stacks_of(targets[0].layer.experts))  # type: ignore[union-attr]
        targets.sort(key=lambda target: order.index(target.name.rpartition(".")[2]))
        for depth, target in enumerate(reversed(targets)):
            found[target.name] = module + depth * _NESTED
    return found
