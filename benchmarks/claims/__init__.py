"""The claims of the BiT paper (arXiv 1912.11370) in miniature: see ``docs/claims.md``."""

from benchmarks.claims import hyperrule, scale, small_batch, transfer

CLAIMS = {module.CLAIM.name: module.CLAIM for module in (small_batch, transfer, scale, hyperrule)}
