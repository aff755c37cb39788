"""What a verification in the sandbox costs: `python -m benchmarks.sandbox`.

Right answers of the environment `code` are verified one after the other, as wrong ones end sooner;
then single programs, one after the other and as many at once as there are processors. Prints
medians over rounds; docs/environments.md has them.
"""

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable

from benchmarks.machine import command, description

from nemotron3.environments import TaskResponse, load_environment
from nemotron3.environments.sandbox import Sandbox

PROGRAM = "print(int(input()) + 1)"


async def rounds_ms(num_rounds: int, each: int, work: Callable[[], Awaitable[object]]) -> float:
    """Median milliseconds for one of `each` that `work` does."""
    found: list[float] = []
    for _ in range(num_rounds):
        started = time.perf_counter()
        await work()
        found.append(1000 * (time.perf_counter() - started) / each)
    return statistics.median(found)


async def verification_ms(difficulty: float, num_rounds: int, num_tasks: int) -> float:
    """Of one right answer."""
    environment = load_environment("code", difficulty=difficulty)
    rows = [environment.task(index) for index in range(num_tasks)]
    responses = [TaskResponse(messages=tuple(environment.solve(row))) for row in rows]
    await environment.seed_session(rows[0])

    async def verify() -> None:
        for row, response in zip(rows, responses, strict=True):
            verification = await environment.verify(row, response, None)
            assert verification.reward == 1

    return await rounds_ms(num_rounds, num_tasks, verify)


async def measure(num_rounds: int, num_programs: int) -> None:
    """Print every figure."""
    async with Sandbox() as sandbox:
        jail = await sandbox.start()

        async def in_turn() -> None:
            for _ in range(num_programs):
                await sandbox.run(PROGRAM, stdin="41")

        async def at_once() -> None:
            await asyncio.gather(*(sandbox.run(PROGRAM, stdin="41") for _ in range(num_programs)))

        print(f"{jail}, {description()['cpu']}, load {os.getloadavg()[0]:.2f}")
        print(f"a program, in turn   {await rounds_ms(num_rounds, num_programs, in_turn):.2f} ms")
        print(f"a program, at once   {await rounds_ms(num_rounds, num_programs, at_once):.2f} ms")
    for difficulty in (0.0, 0.5, 1.0):
        cost = await verification_ms(difficulty, num_rounds, num_programs)
        print(f"a verification at {difficulty:.1f}  {cost:.2f} ms")


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--programs", type=int, default=50)
    given = parser.parse_args()
    print(command("benchmarks.sandbox"))
    asyncio.run(measure(given.rounds, given.programs))


if __name__ == "__main__":
    main()
