"""The inference engine: requests in, tokens out, by the same forward pass that trains."""
