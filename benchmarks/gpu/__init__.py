"""Parts of ``benchmarks/gpu_suite.py``: shapes, checks, timing, tuning, benchmarks. Run the suite, not these."""
