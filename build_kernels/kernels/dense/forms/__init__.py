"""The dense forms: each divides the router in another way, with the same bits."""
