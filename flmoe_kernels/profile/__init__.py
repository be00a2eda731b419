"""Timing, costs and registry of cases, for benchmarks and the profiler."""
