"""Measured against peers and physical limits, in one run: ``python -m benchmarks [case...]``.

Every candidate of a case runs in a process of its own, alternated with the others; figures are medians over
the rounds, and a bar is met or not by ratios within the same round. See ``docs/benchmarks.md``.
"""
