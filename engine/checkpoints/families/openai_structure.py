"""The resolution levels of an OpenAI state dict, found from its keys and shapes."""

from __future__ import annotations

from dataclasses import dataclass

from engine.checkpoints.families.state_dict import StateDict, submodules
from engine.errors import CheckpointError
from engine.networks import config as c


@dataclass(frozen=True, slots=True)
class Levels:
    """num_groups: entries of input_blocks (and of output_blocks). down_at: the entries that halve the resolution.

    resamples_in_blocks: resblock_updown, resampling inside ResBlocks. has_weights: resampling convolutions.
    other_depths: numbers of ResBlocks a level that fit the file as well as the 2 that were taken.
    """

    num_groups: int
    down_at: frozenset[int]
    resamples_in_blocks: bool
    has_weights: bool
    other_depths: tuple[int, ...] = ()

    def upsamples_without_weights(self, index: int, group: list[c.Block]) -> bool:
        """Whether output group `index` ends in an upsampling that left no tensors in the file."""
        if self.resamples_in_blocks or self.has_weights:
            return False
        # Output group i undoes input group num_groups - 1 - i; it doubles where that one came after a halving.
        return self.num_groups - 1 - index in self.down_at and bool(group)


def find_levels(state: StateDict, num_res_blocks: int | None, halvings: int | None) -> Levels:
    """Where a U-Net or classifier changes resolution; raises CheckpointError if the keys leave it open.

    num_res_blocks, halvings: what is known from elsewhere about a classifier that resamples in its ResBlocks.
    """
    present = {int(name.split(".")[1]) for name in submodules(state, "input_blocks")}
    is_unet = state.has("output_blocks.")
    num_groups = len(submodules(state, "output_blocks")) if is_unet else max(present) + 1
    convs = {i for i in present if state.has(f"input_blocks.{i}.0.op.")}
    gaps = set(range(num_groups)) - present
    if convs or gaps:
        return Levels(num_groups, frozenset(convs or gaps), resamples_in_blocks=False, has_weights=bool(convs))
    others: tuple[int, ...] = ()
    if is_unet:
        down_at = _down_from_output(state, num_groups)
    else:
        down_at, others = _down_from_input(state, num_groups, num_res_blocks, halvings)
    return Levels(num_groups, down_at, resamples_in_blocks=bool(down_at), has_weights=False, other_depths=others)


def _down_from_output(state: StateDict, num_groups: int) -> frozenset[int]:
    """With resblock_updown an output group that ends a level holds a second ResBlock, which doubles."""
    ups = [
        i
        for i in range(num_groups)
        if sum(state.has(f"{name}.in_layers.") for name in submodules(state, f"output_blocks.{i}")) == 2
    ]
    return frozenset(num_groups - 1 - i for i in ups)


def _down_from_input(
    state: StateDict, num_groups: int, num_res_blocks: int | None, halvings: int | None
) -> tuple[frozenset[int], tuple[int, ...]]:
    """A resblock_updown encoder alone: levels of n ResBlocks, all but the last followed by one that halves.

    num_groups = levels * (n + 1). Where several n fit the widths and the attention, guided-diffusion's default 2 is
    taken if it is among them, else the user has to say. Returns where it halves, and the n that fit as well.
    """
    fitting = [n for n in range(1, num_groups) if _is_depth(state, num_groups, n)]
    if halvings is not None:
        fitting = [n for n in fitting if num_groups == (halvings + 1) * (n + 1)]
    if num_res_blocks is not None:
        fitting = [n for n in fitting if n == num_res_blocks]
    if len(fitting) != 1 and 2 not in fitting:
        found = ", ".join(map(str, fitting)) or "none fits what was given"
        raise CheckpointError(
            f"the file leaves open how many ResBlocks a level has ({found}); give the training's --num-res-blocks and "
            "--image-size"
        )
    depth = fitting[0] if len(fitting) == 1 else 2
    return frozenset(range(depth + 1, num_groups, depth + 1)), tuple(n for n in fitting if n != depth)


def _is_depth(state: StateDict, num_groups: int, depth: int) -> bool:
    """Whether levels of `depth` ResBlocks agree with where widths change and attention stands."""
    if num_groups % (depth + 1):
        return False
    for start in range(0, num_groups, depth + 1):
        sizes = {len(submodules(state, f"input_blocks.{i}")) for i in range(start + 1, start + depth + 1)}
        keeps = [not state.has(f"input_blocks.{i}.0.skip_connection.") for i in range(start, start + depth + 1)]
        halves_plainly = start == 0 or (keeps[0] and len(submodules(state, f"input_blocks.{start}")) == 1)
        if len(sizes) != 1 or not halves_plainly or not all(keeps[2:]):
            return False
    return True
