"""Metadata of the mount: the key-value interface, its engines, and the POSIX tree on top of it."""
