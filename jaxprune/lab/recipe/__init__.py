"""An experiment as a file: the tables of a config, their words, and the objects that these name.

`config`, `fields` and the sections are the types of all keys, `reference` lists them; `overrides` take values from the
command line; `words` and `build` turn names into the library's objects, `problems` into one sentence what is wrong with
them. Nothing here runs anything.
"""
