"""Pure tensor functions: a folder per operation, each with a reference, faster files, and one door (`api.py`)."""
