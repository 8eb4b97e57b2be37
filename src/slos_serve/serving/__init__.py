"""`slos-serve serve`: vLLM's own OpenAI server as a child process, with our scheduler and a measured profile."""
