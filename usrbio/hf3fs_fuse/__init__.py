"""3FS's Python package name: programs written for 3FS import `hf3fs_fuse.io` and find kvfs."""
