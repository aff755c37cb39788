"""/v1/chat/completions: a conversation in, a message out."""
