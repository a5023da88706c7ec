"""State on disk that survives a kill at any moment, and opens to the bit.

`checkpoint` writes and reads, `manifest` holds the checksums, `flat` the form without containers, `orbax_files` what
Orbax sees. Nothing here knows what the arrays mean.
"""
