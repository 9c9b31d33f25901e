"""Anthropic's words: messages, asked and answered."""
