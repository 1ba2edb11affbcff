"""The kvfs file system: namespace, mount, node and command line. Data moves in native code (see native/)."""

__version__ = "0.1.0"
