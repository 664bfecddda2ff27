"""nanotron_fast under an installed Nanotron.

Importing this package changes nothing: every module of it acts only when one of its functions is
called, and every function that changes something has a counterpart that puts it back.
"""
