"""Adapters to libraries that run models. Each module imports its library; this package does not."""
