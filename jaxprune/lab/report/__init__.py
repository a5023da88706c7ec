"""What people look at: pages, figures and tables made from results.

`publish` writes a run's page and figures, `html` fills in the page's template, `comparison` makes the tables in
Markdown files; `wording` has numbers and units in words, `style` the look of every figure.
Results are read, never computed: no model is run in here.
"""
