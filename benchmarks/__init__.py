"""Benchmarks: `pytest benchmarks/ --benchmark-only`, one bench_<family>.py per operator family."""
