"""Many runs under one protocol: comparisons, sweeps, and the tables that sum them up."""
