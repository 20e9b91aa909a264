"""A student behind HTTP."""
