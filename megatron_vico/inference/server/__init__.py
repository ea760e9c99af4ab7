"""`vico serve`: the engine behind OpenAI's chat completions."""
