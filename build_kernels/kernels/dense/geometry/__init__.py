"""How each dense form divides a router: plain arithmetic, without the DSL."""
