"""The demonstration: a real two-stage cascade, from pretrained weights to a report."""
