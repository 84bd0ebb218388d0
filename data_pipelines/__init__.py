"""Text to numbered units: sources, formats, tokenizing, order, and their preparation with Ray Data.

Imports run downwards only: formats ← sources ← tokenizing ← order ← prepare, the only file that uses Ray.
"""
