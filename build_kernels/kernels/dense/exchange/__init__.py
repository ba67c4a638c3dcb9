"""How partial sums of a split hidden dimension get to the CTA that adds them."""
