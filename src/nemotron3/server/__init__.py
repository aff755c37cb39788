"""The engine over HTTP, with the API of OpenAI and the parameters of vLLM, and a page to chat."""
