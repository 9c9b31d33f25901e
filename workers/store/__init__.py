"""One host's store: KV below the engines' pools."""
