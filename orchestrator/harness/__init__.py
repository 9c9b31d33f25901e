"""For agents' harnesses: a client of the cache API, beside the OpenAI or Anthropic client that asks for answers."""
