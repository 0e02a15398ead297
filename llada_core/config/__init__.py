"""Configuration as frozen values: each file holds the blocks of one room, `params.py` puts them together.

This package knows names, types and limits. It does not know torch, files of data, or what a value is used for.
"""
