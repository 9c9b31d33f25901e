"""OpenAI's words: chat and text completions, asked and answered."""
