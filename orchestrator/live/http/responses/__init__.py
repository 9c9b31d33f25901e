"""OpenAI's Responses API: answers made of items, kept so that the next turn need not repeat them."""
