"""The dense router in one launch: gate logits, selection and weights (CuTe DSL)."""
