"""Pure tensor functions, a folder per operation: a reference, faster files, one entry point."""
