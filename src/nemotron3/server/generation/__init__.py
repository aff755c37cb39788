"""What the endpoints that generate share: from fields of a body to the engine and back."""
