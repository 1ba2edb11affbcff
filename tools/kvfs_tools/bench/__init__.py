"""`kvfs bench`: how fast this kvfs is on this disk, beside fio in the same minutes on the same file system.

`scratch` owns the daemon and files that are measured, `programs` runs ring_bench and fio, `measure` owns what is
measured and against what, `report` the table's rows.
"""
