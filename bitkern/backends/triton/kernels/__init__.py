"""Device code, one file per operator: what profilers show by these names."""
