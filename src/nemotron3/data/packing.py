"""Pack sequences of different lengths into rows of equal capacity, without cutting any.

Best fit: each sequence goes into the row with the smallest free space that holds it, else into a
new row. In random order this fills rows nearly as well as sorting by length, and rows stay random
mixtures: sorting would put long conversations together.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from nemotron3.errors import DataError


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, in the order in which the rows were opened.

    Raises DataError for a sequence that is longer than a row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # free space and row, sorted
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise DataError(
                f"sequence {index} has {length} tokens and a row {capacity}; give rows more tokens "
                "or leave the sequence out"
            )
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(index)
        if room > length:
            insort(rooms, (room - length, row))
    return rows
