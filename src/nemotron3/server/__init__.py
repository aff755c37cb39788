"""HTTP in front of the engine, in OpenAI's shapes and vLLM's words; a page to chat with."""
