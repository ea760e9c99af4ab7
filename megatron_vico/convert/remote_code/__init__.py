"""Model code that travels with exports; the rest of the package copies these files and never
imports them."""
