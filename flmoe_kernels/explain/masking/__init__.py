"""What a model loses when tokens are masked."""
