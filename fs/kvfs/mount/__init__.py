"""The FUSE mount: the POSIX tree as `/` and every KV block as a file below `/.kvfs/blocks`."""
