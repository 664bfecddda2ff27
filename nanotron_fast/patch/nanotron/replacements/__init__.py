"""What stands in for Nanotron's functions and methods, by factories that the table names.

Each factory takes the function that it replaces and the options, and gives one that takes the same
arguments. Where it meets what our operation does not serve, it calls the one it replaces.
"""
