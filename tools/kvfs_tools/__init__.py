"""Tools around a kvfs store: what this host can do (doctor), checking and repair, benchmarks."""
