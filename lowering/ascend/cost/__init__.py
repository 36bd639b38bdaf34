"""What a kernel call costs, from formulas with sources."""
