"""Operators and whole models against what users run today. ``pytest benchmarks/bench_ops.py``"""
