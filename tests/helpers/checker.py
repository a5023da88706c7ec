"""The run-time check of annotations that `conftest` lays over the package; an int is a float too, as PEP 484 has it."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
