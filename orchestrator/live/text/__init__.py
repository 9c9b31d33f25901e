"""Between text and tokens: chat templates, tokenisers, tool calls."""
