"""Change: models and the OS are replaced without a gap, and a bad release goes back by itself."""
