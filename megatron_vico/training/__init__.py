"""The loop, the step functions of the stages, and what they log."""
