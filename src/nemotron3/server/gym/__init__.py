"""An environment over HTTP, as a resources server of NeMo Gym."""
