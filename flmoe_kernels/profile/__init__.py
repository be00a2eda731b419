"""What is timed, against whom, and how: one registry for benchmarks, the profiler and the documentation."""
