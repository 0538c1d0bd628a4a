"""Change an existing model: PEER in place of its feed-forward layers or beside them, and retrieved adapters."""
