"""How each form multiplies: one object per form and MMA.

Objects for one form have the same methods, which the form calls. Partial sums lie in the same
registers with every MMA: of each 16 rows x 8 columns, lane l has rows l / 4 and l / 4 + 8, columns
2 (l % 4) and one more (``tcgen05_layout.fragment``).
"""
