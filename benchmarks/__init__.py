"""Operators and whole models against what users run today: ``pytest benchmarks/``.

A selection in under 10 minutes, ``--full`` for the rest, ``--tiny`` for a dry run. To see whether a
commit is slower: ``--benchmark-save=before`` at the one, and at the other
``--benchmark-compare='*_before' --benchmark-compare-fail=median:10%``.
"""
