"""The inside of the sandbox: a process of its own, of the standard library alone.

It is started as the package `jail`, with no other part of `nemotron3` in reach: programs are forked
from it, and whatever it had imported would be theirs to look into. Its modules therefore import
each other relatively.
"""
