"""Ids in, scores out: packs with shared beginnings, what fits into memory, layers that stream.

Knows no text and no files.
"""
