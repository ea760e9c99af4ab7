"""The vocabulary heads and the losses fused with them."""
