"""Attention over a packed trie: `api.py` validates and chooses, one file per implementation computes."""
