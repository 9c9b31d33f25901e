"""Drafts by a pool of their own: processes that hold a draft model, and nodes that ask them."""
