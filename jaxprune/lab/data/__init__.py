"""Data sets by name: brought, read, shuffled by a key, and turned into batches.

`sets` has the names, `own_data` brings a user's own, `files` and `importing` what lies on disk, `streams` the images
that are read as batches need them, `samples` and `images` small parts. Where a data set came from is not visible to a
run.
"""
