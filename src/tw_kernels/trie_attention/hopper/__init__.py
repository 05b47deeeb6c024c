"""Trie attention in Gluon for Hopper (sm_90): TMA, wgmma, one warp group that loads and two that compute."""
