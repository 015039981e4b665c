"""Which waiting samples make a row: as many tokens as fit, and where pictures are balanced, as many tiles as wanted.

The oldest sample opens the row, so that one which fits badly, an over-long one above all, waits for at most as many
rows as there are candidates. What joins it is the best there is, found exactly: sums of tokens are bits of one whole
number, and adding a sample to all of them is a shift. Source: SAIL-VL2 report, section 5.1; the search is ours.
"""

from collections.abc import Sequence

FULL = 0.99  # a row this full is not made fuller at the price of its pictures' balance


def choose(lengths: Sequence[int], capacity: int) -> list[int]:
    """The first, and those that leave the fewest of `capacity` tokens free with it; of equal ones the oldest."""
    room = capacity - lengths[0]
    limit = (2 << room) - 1
    tables = [[1]]  # bit n: some of the first samples have n tokens together
    for length in lengths[1:]:
        (sums,) = tables[-1]
        tables.append([(sums | sums << length) & limit])
    return _members(lengths, [0] * len(lengths), tables, tables[-1][0].bit_length() - 1, 0)


def _members(
    lengths: Sequence[int], tiles: Sequence[int], tables: Sequence[Sequence[int]], total: int, count: int
) -> list[int]:
    """The samples of a reachable sum with `count` tiles; a later one only where the earlier ones do not reach it."""
    members = []
    for number in range(len(lengths) - 1, 0, -1):
        if not tables[number - 1][count] >> total & 1:
            members.append(number)
            total, count = total - lengths[number], count - tiles[number]
    return [0, *members[::-1]]


def choose_balanced(lengths: Sequence[int], tiles: Sequence[int], capacity: int, wanted: int) -> list[int]:
    """The first, and others with it, so that the row has `wanted` tiles, or as near as can be, and is full.

    Nearness comes first among rows that are `FULL`; where there are none, each tile off costs 5% of a row.
    """
    room, most = capacity - lengths[0], max(wanted, tiles[0]) + 2
    limit = (2 << room) - 1
    tables = [[0] * (most + 1)]  # of each number of tiles, the reachable sums
    tables[0][tiles[0]] = 1
    for length, count in zip(lengths[1:], tiles[1:], strict=True):
        before = tables[-1]
        added = [0] * min(count, most + 1) + [sums << length & limit for sums in before[: max(0, most + 1 - count)]]
        tables.append([old | new for old, new in zip(before, added, strict=True)])
    left = {count: room - sums.bit_length() + 1 for count, sums in enumerate(tables[-1]) if sums}

    def cost(count: int) -> tuple[float, int]:
        off, free = abs(count - wanted), max(0.0, left[count] / capacity - (1 - FULL))
        return free + 0.05 * off, left[count]

    count = min(left, key=cost)
    return _members(lengths, tiles, tables, room - left[count], count)


def plan_rows(lengths: Sequence[int], capacity: int, candidates: int = 64) -> list[list[int]]:
    """Rows of all samples, each in exactly one; for a data set that is small enough to be read at once."""
    waiting = list(range(len(lengths)))
    rows = []
    while waiting:
        row = [waiting[place] for place in choose([lengths[number] for number in waiting[:candidates]], capacity)]
        rows.append(row)
        taken = set(row)
        waiting = [number for number in waiting if number not in taken]
    return rows
