"""HTTP alone: middleware, CORS, errors, strict bodies, event streams, logs, metrics, draining."""
