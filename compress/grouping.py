"""Which neighbours share: groups of blocks that are alike, as plain integers.

Source: FoldGPT, "grouped parameter sharing"; how groups are cut and chosen is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def stretches(kinds: Sequence[object], keep_ends: int) -> list[range]:
    """Maximal runs of neighbours of one kind, without the first and the last ``keep_ends``."""
    found: list[range] = []
    for i in range(keep_ends, len(kinds) - keep_ends):
        if found and kinds[found[-1].start] == kinds[i]:
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return found


def fixed_runs(room: Sequence[range], size: int) -> list[range]:
    """Groups of ``size`` neighbours, one after the other from the start of each stretch; what is left over stays."""
    return [range(i, i + size) for each in room for i in range(each.start, each.stop - size + 1, size)]


def all_runs(room: Sequence[range], size: int) -> list[range]:
    """Every run of ``size`` neighbours; they overlap."""
    return [range(i, i + size) for each in room for i in range(each.start, each.stop - size + 1)]


def greedy_runs(harm: Mapping[int, float], room: Sequence[range], size: int, count: int) -> list[range]:
    """So many groups of ``size`` neighbours that do not overlap, the least harmful first while the others find room.

    Args:
        harm: start of a group -> what it does; every place in ``room`` where one fits.
        room: stretches that groups lie in.
        size: of a group.
        count: how many are wanted, at most as many as fit.

    Returns:
        The groups, in order of the model.
    """
    left, taken = list(room), list[range]()
    for start in sorted(harm, key=lambda start: (harm[start], start)):
        around = next((each for each in left if each.start <= start and start + size <= each.stop), None)
        if around is None or len(taken) == count:
            continue
        rest = [each for each in left if each is not around]
        rest += [range(around.start, start), range(start + size, around.stop)]
        if len(taken) + 1 + sum(len(each) // size for each in rest) >= count:
            left = rest
            taken.append(range(start, start + size))
    return sorted(taken, key=lambda each: each.start)
