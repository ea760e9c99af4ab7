"""The paper: Eq. 1-4 of ViCO on plain torch tensors."""
