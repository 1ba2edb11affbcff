"""Connectors of inference engines. Each is a package of its own and imports its engine; nothing here does."""
