"""Adapters to other libraries, which are imported only with their modules."""
