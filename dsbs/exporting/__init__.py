"""Exporting: students in formats that run without dsbs."""
