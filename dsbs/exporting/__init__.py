"""A student in the format of another runtime: one file a format, checked against the student itself."""
