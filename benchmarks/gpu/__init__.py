"""Everything that a GPU has to say, in one call of under ten minutes.

    make gpu-check                                  # python -m benchmarks.gpu
    make gpu-tune                                   # python -m benchmarks.gpu --tune
    python -m benchmarks.gpu --toy                  # the same path at toy size, without a GPU

Machines with a GPU are lent for minutes, so the call is arranged for losing nothing: the most
important section comes first, each runs in a process of its own, each part of it is written down
when it is done, and what there was no time for is named. A section is one file of `sections/`.
"""
