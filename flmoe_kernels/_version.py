"""The version, kept here alone: packaging, the command line and the tests all read it."""

__version__ = "0.1.0"
