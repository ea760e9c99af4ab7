"""The same maths over process groups; each file equals a one-process function."""
