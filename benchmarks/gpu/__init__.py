"""All GPU checks and measurements, in one call of less than ten minutes.

    make gpu-check                                  # python -m benchmarks.gpu
    make gpu-tune                                   # python -m benchmarks.gpu --tune
    python -m benchmarks.gpu --toy                  # the same path at toy size, without a GPU

A machine with a GPU may be available for minutes only, so the call must not lose results: the most
important section comes first, each runs in its own process, each of its parts is saved when it is
done, and parts for which there was no time are named. A section is one file in `sections/`.
"""
