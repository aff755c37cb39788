"""Pure tensor functions: a folder per operation, with a reference, faster files and one door."""
