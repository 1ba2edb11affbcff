"""`kvfs bench`: how fast this kvfs is on this disk, beside fio's figures in the same minutes on the same file system.

`scratch` owns the daemon and files that are measured, `programs` runs ring_bench and fio, `measure` owns what is
measured and against what, `report` the tables' rows. `kvfs bench posix`, the mount beside other file systems: `posix`
owns the measures, `contenders` the file systems, `fileworker` is the program that works on files, `interrupts` sees to
it that a signal leaves nothing behind.
"""
