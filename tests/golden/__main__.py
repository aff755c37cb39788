"""`python -m tests.golden` writes the files anew."""

from tests.golden import write

write()
