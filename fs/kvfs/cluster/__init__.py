"""Chunk servers and their clients as Python sees them: cluster map, capabilities, `kvfs serve chunk`, remote nodes."""
