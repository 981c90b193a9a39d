"""Parts of the CPU suite, ``benchmarks/cpu_suite.py``."""
