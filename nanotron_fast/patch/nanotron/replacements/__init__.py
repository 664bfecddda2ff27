"""What stands in for Nanotron's functions and methods, by factories that the table names.

Each factory takes the function that it replaces and the user's options, and returns a function of
the same arguments. Where that meets what our operation does not serve, it calls the
function that it replaces.
"""
