"""The command line: one file a command, `main` the door.

Arguments become calls of the other rooms, and errors one sentence. Whatever a user might want to call from Python is
not here but in those rooms.
"""
