"""Routed generation."""
