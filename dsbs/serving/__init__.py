"""The inference server: a student behind HTTP."""
