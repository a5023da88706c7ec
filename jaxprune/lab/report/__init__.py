"""What people look at: pages, figures and tables made from results.

`publish` writes a run's page and figures, `comparison` the tables in Markdown files, `wording` figures in words.
Results are read, never computed: no model is run in here.
"""
