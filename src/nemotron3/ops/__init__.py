"""Pure tensor functions, each in a folder with a reference, faster backends and an entry point."""
