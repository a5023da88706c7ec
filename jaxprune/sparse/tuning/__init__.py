"""Which format is fastest here: measured, remembered, and never slower than dense.

`tune` makes the plan: a `race` for every site, then the `whole` model; `timing` is the clock, `machine` says where it
ran, `records` and `cache` keep what was measured. Formats and products are next door and know nothing of this.
"""
