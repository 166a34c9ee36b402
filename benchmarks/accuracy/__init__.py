"""What fixed point costs on real data: float against every way of quantizing, one table."""
