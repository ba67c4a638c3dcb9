"""Epilogues of the forms that screen: from logits in shared memory to stored ids and weights."""
