"""Fewer bits for each weight: codes, shared values, and INT8.

`codes` and `codebooks` put integers or shared values in place of floats, `sharing` fine-tunes the shared ones, `int8`
simulates integer inference for tables of accuracy. How codes are written to a file is the business of `storage`.
"""
