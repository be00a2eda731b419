"""Code shared by all operators: backends, registration, validation, native module."""
