"""State on disk that survives a kill at any moment, and opens to the bit.

`checkpoint` writes and reads, `manifest` holds the checksums, `flat` the form without containers, `orbax_files` what
Orbax sees, `foreign` what containers of others do not say of a model. How a model was trained is not known here.
"""
