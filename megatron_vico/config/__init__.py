"""What a run is: typed options, flags and checks."""
