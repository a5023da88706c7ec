"""A run: its stages in order, its folder, and going on after a kill.

`run` keeps the folder, `stages` what happens to one seed, `train` the loop itself, `sweep` a grid of runs; `store` and
`metrics` are what a run leaves behind. What a run's page looks like is decided in `report`.
"""
