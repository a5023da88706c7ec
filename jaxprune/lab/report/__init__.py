"""What people look at: pages, figures and tables made from results.

`results` reads what runs, sweeps and benchmarks left on disk, `publish` writes a run's page and figures, `sweeps` those
of a grid, `html` fills in the page's template, `comparison` makes the tables in Markdown files; `wording` has numbers
and units in words, `style` the look of every figure. Results are read, never computed: no model is run in here, and no
run is known.
"""
