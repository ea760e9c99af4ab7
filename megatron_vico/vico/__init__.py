"""The paper: Eq. 1-4 of ViCO on plain torch tensors, and the very code that trains.

Eq. 1, KL of a response row     consistency.py        called by models/heads/kl.py
Eq. 1, expectation over xi      compression_plan.py   `plan_stratified`, `plan_fraction`
Eq. 2, loss ratio               router_targets.py     `loss_ratio`, over `sample_means`
Eq. 3, label and threshold      router_targets.py     `labels_from_ratios`, `RatioWindow`
Eq. 4, probability and plan     routing.py            its logits are models/vir.py's
"""
