"""Benchmarks: every loss, on named workloads, against eager, torch.compile and the bandwidth floor.

pytest benchmarks/ --benchmark-only   the suite (pytest-benchmark)
python -m benchmarks.run              the suite; JSON, table and plot in benchmarks/results
python -m benchmarks.teacher_cache    a teacher's cache of a million tokens on disk
python -m benchmarks.targets          the ratios that the project promises, PASS or MISS
"""
