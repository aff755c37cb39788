"""The verbs of the `nemotron3` command."""
